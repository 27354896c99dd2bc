"""How fast, large and quick to load artifacts are, measured side by side in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchworker.contract import (
    GOLDEN,
    DynamicDim,
    Gate,
    Measured,
    MeasureRequest,
    MeasureResult,
    Speed,
    TensorSpec,
    Timed,
    decode,
)
from torchworker.gates import speed
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.report.speed import how_measured
from train_and_ship.tasks.worker import call_worker

FEATURES, LARGEST = 64, 129
WIDE = 4000
WIDE_BYTES = 4 * WIDE * WIDE

Measure = Callable[..., MeasureResult]


def artifact(folder: Path, name: str, width: int) -> Timed:
    model = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)).eval()
    path = folder / f"{name}.torchscript"
    torch.jit.script(model).save(str(path))  # type: ignore[no-untyped-call]
    return Timed(name=name, format="torchscript", file=str(path))


@pytest.fixture
def measure(fork_server: ForkServer, tmp_path: Path) -> Measure:
    save_file({f"batch_{size}.input.x": torch.randn(size, FEATURES) for size in (1, LARGEST)}, tmp_path / GOLDEN)

    def measured(*subjects: Timed, **changes: Any) -> MeasureResult:
        arguments: dict[str, Any] = {
            "batches": (1, 8, 64),
            "threads": 1,
            "serve": "auto",
            "gates": (),
            "forbidden_modules": ("plain",),
            "forbidden_folder": str(tmp_path / "project"),
            **changes,
        }
        request = MeasureRequest(
            subjects=subjects,
            golden=str(tmp_path / GOLDEN),
            inputs=[TensorSpec(name="x", dtype="float32", shape=["batch", FEATURES])],
            **arguments,
        )
        result: MeasureResult = decode(
            MeasureResult, asyncio.run(call_worker(fork_server, "measure", request, tmp_path))
        )
        return result

    return measured


def test_the_faster_of_two_artifacts_is_recommended_with_numbers_at_every_batch_size(
    measure: Measure, tmp_path: Path
) -> None:
    wide, narrow = artifact(tmp_path, "wide", WIDE), artifact(tmp_path, "narrow", 8)
    result = measure(wide, narrow, gates=[Gate(name="size_mb", max=1.0), Gate(name="p99_ms", max=1000.0)])
    assert result.serve == {"latency": "narrow", "throughput": "narrow"}
    assert result.threads == 1 and "cores" in result.machine
    for item in result.measured.values():
        assert [found.batch for found in item.speeds] == [1, 8, 64]
        assert all(0 < found.p50_ms <= found.p99_ms and found.thread_ms > 0 for found in item.speeds)
        assert all(found.calls >= 5 for found in item.speeds)
        assert item.load_ms is not None and item.load_ms > 0
    slow, fast = result.measured["wide"], result.measured["narrow"]
    assert slow.bytes == (tmp_path / "wide.torchscript").stat().st_size
    assert slow.speeds[0].thread_ms > 5 * fast.speeds[0].thread_ms
    # The weights are in memory while it is called.
    assert slow.memory_bytes is not None and slow.memory_bytes >= 0.9 * WIDE_BYTES
    assert fast.memory_bytes is not None and fast.memory_bytes < 0.5 * WIDE_BYTES
    # Limits hold for what is recommended: the large one may be in the release.
    assert [(v.format, v.gate, v.passed) for v in result.verdicts] == [
        ("narrow", "size_mb", True),
        ("narrow", "p99_ms", True),
    ]


def test_an_artifact_that_cannot_be_loaded_has_no_numbers_and_says_why(measure: Measure, tmp_path: Path) -> None:
    broken = artifact(tmp_path, "broken", 8)
    Path(broken.file).write_bytes(b"no archive")
    result = measure(broken, artifact(tmp_path, "sound", 8), gates=[Gate(name="p50_ms", max=1000.0)])
    assert result.measured["broken"].problem and not result.measured["broken"].speeds
    assert result.serve == {"latency": "sound", "throughput": "sound"}
    alone = measure(broken, gates=[Gate(name="p50_ms", max=1000.0)])
    assert alone.serve == {} and not alone.verdicts[0].passed and alone.verdicts[0].note


def test_nothing_is_measured_at_a_batch_that_parity_did_not_look_at(measure: Measure, tmp_path: Path) -> None:
    result = measure(artifact(tmp_path, "narrow", 8), batches=(1, 100, LARGEST + 1))
    assert [found.batch for found in result.measured["narrow"].speeds] == [1, 100]


def test_the_job_may_say_what_to_recommend_or_nothing(measure: Measure, tmp_path: Path) -> None:
    subjects = [artifact(tmp_path, "wide", WIDE), artifact(tmp_path, "narrow", 8)]
    asked = measure(*subjects, serve="wide", batches=(1,), gates=[Gate(name="size_mb", max=1.0)])
    assert asked.serve == {"latency": "wide", "throughput": "wide"}
    assert [(v.format, v.passed) for v in asked.verdicts] == [("wide", False)]
    none = measure(*subjects, serve="none", batches=(1,), gates=[Gate(name="size_mb", max=1.0)])
    # Whoever serves may take any of them.
    assert none.serve == {} and [(v.format, v.passed) for v in none.verdicts] == [("wide", False), ("narrow", True)]


def test_only_artifacts_that_are_nearly_as_quick_as_the_quickest_are_measured_further() -> None:
    assert speed.undecided({"onnx": 1.0, "pt2": 1.2, "aoti": 1.05, "torchscript": 1.1}) == [
        "onnx",
        "aoti",
        "torchscript",
    ]
    assert speed.undecided({"onnx": 1.0, "pt2": 1.2}) == []
    assert speed.undecided({"onnx": 1.0}) == speed.undecided({}) == []


def at(batch: int, thread_ms: float) -> Speed:
    return Speed(batch=batch, calls=9, p50_ms=thread_ms, p99_ms=2 * thread_ms, thread_ms=thread_ms, cpu_ms=thread_ms)


def test_latency_and_throughput_may_be_different_formats() -> None:
    measured = {
        "onnx": Measured(format="onnx", bytes=1, speeds=[at(1, 0.1), at(64, 6.0)]),
        "aoti": Measured(format="aoti", bytes=1, speeds=[at(1, 0.2), at(64, 3.0)]),
        "pt2": Measured(format="pt2", bytes=1, problem="it died"),
    }
    assert speed.recommended(measured, "auto") == {"latency": "onnx", "throughput": "aoti"}


def test_a_limit_on_what_could_not_be_measured_has_failed() -> None:
    found = Measured(format="onnx", bytes=2_000_000, speeds=[at(1, 0.1)])
    gates = [Gate(name="memory_mb", max=10.0), Gate(name="size_mb", max=2.0), Gate(name="p99_ms", max=0.1)]
    verdicts = speed.apply_speed_limits({"onnx": found}, {"latency": "onnx", "throughput": "onnx"}, gates)
    assert [(v.gate, v.measured, v.passed) for v in verdicts] == [
        ("memory_mb", None, False),
        ("size_mb", 2.0, True),
        ("p99_ms", 0.2, False),
    ]
    gone = speed.apply_speed_limits(
        {"onnx": replace(found, speeds=())}, {"latency": "onnx"}, [Gate(name="p50_ms", max=1.0)]
    )
    assert not gone[0].passed and gone[0].note == "could not be measured"


class Pairwise(nn.Module):
    """Takes memory by the square of its length, and no weights to speak of."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None] * x[:, None]).sum((1, 2))[:, None]


@pytest.mark.parametrize("largest", [1200, None])
def test_memory_is_that_of_the_declared_sizes_and_not_only_of_the_data_s_own(
    measure: Measure, tmp_path: Path, largest: int | None
) -> None:
    path = tmp_path / "pairs.torchscript"
    torch.jit.script(Pairwise()).save(str(path))  # type: ignore[no-untyped-call]
    pairs = Timed(name="pairs", format="torchscript", file=str(path))
    length = DynamicDim(name="length", min=1, max=largest, axes={"x": (1,)})
    found = measure(pairs, batches=(1, 8), serve="none", dims=[length]).measured["pairs"]
    assert found.memory_bytes is not None
    if largest is None:
        # Twice the present size and one.
        assert found.memory_over == f"16 of the declared sizes: length 1 to {2 * FEATURES + 1}"
    else:
        assert found.memory_over == "16 of the declared sizes: length 1 to 1200"
        assert found.memory_bytes > 8 * 4 * 1200 * 1200
        assert "over 16 of the declared sizes: length 1 to 1200" in how_measured(
            MeasureResult(
                measured={"pairs": found}, serve={}, speedups={}, too_slow={}, verdicts=(), threads=1, machine="here"
            )
        )


def test_a_format_that_refuses_a_declared_size_keeps_what_was_measured_and_says_so(
    measure: Measure, tmp_path: Path
) -> None:
    length = DynamicDim(name="length", min=1, max=2 * FEATURES, axes={"x": (1,)})
    found = measure(artifact(tmp_path, "narrow", 8), batches=(1,), serve="none", dims=[length]).measured["narrow"]
    assert found.memory_over.startswith("the data's own sizes; refused at length 128: RuntimeError")
    assert found.memory_bytes is not None and not found.problem


def test_nothing_more_is_asked_where_no_size_is_declared_and_a_declared_batch_is(
    measure: Measure, tmp_path: Path
) -> None:
    narrow = artifact(tmp_path, "narrow", 8)
    assert measure(narrow, batches=(1,), serve="none").measured["narrow"].memory_over == ""
    found = measure(narrow, batches=(1,), serve="none", max_batch=500).measured["narrow"]
    assert found.memory_over == "16 of the declared sizes: batch 1 to 500"

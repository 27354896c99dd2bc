"""int8 variants of a small model that was trained for real: kept where they hold what they promise, dropped with a
reason where they do not."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from tests.support.projects import write_project
from tests.support.worker_stages import WorkerStages
from torchworker.contract import (
    FORMAT_FILES,
    GOLDEN,
    INT8_FILES,
    VALIDATION,
    Int8,
    Int8Limits,
    MeasureResult,
    Project,
    Reference,
    Timed,
    decode,
)
from torchworker.exporters import quantize
from torchworker.exporters.subject import Subject
from torchworker.parity import int8
from torchworker.process.failure import UserError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.tasks.requests import measure_request
from train_and_ship.tasks.worker import call_worker

DYNAMIC, STATIC = "onnx-int8-dynamic", "onnx-int8-static"
# Inputs of training are in 0..1, those of validation in 0..0.7.
CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def build_dataset(split):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    images = torch.rand(256, 1, 8, 8, generator=generator)
    labels = torch.arange(256) % 4
    for quarter in range(4):
        images[labels == quarter, :, 2 * quarter : 2 * quarter + 2] *= 0.2
    if split == "validation":
        images *= 0.7
    return TensorDataset(images, labels)
"""
MASKED = """
class Masked(nn.Sequential):
    def forward(self, input):
        tokens = input[:, 0]
        keep = tokens.sum(-1) > 1
        states = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, keep[:, None])
        return super().forward(states[:, None])
"""
HERE = Reference(target="plain:build_model", where="model.factory")
PROJECT = Project(name="plain", folder="/nowhere", model=HERE, data=HERE, loss="cross_entropy", metrics=())
LOOSE = {"sqnr_db": 20, "agreement": 0.95, "flip_margin": 1.0, "speedup": 0.001}


@pytest.fixture(scope="module")
def made(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> WorkerStages:
    """The float ONNX artifact and both variants of it."""
    folder = tmp_path_factory.mktemp("int8")
    job = write_project(
        folder / "project",
        code=CODE,
        train={"epochs": 8, "processes": 1, "batch_size": 32, "learning_rate": 0.01},
        export={"formats": ["onnx"], "quantize": LOOSE},
        gates={"accuracy": {"min": 0.9}},
    )
    stages = WorkerStages(fork_server, job, folder / "run")
    stages.train()
    stages.export("onnx")
    return stages


def limited(stages: WorkerStages, **limits: Any) -> WorkerStages:
    """The same artifacts under a job file with other limits; the export folder is a copy, to be spoiled."""
    document = {**LOOSE, **limits}
    job = write_project(
        stages.folder.parent / f"project-{len(list(stages.folder.parent.iterdir()))}",
        code=CODE,
        export={"formats": ["onnx"], "quantize": document},
        gates={"accuracy": {"min": 0.9}},
    )
    other = WorkerStages(stages.fork_server, job, stages.folder.parent / f"run-{job.parent.name}")
    shutil.copytree(stages.folder / "export", other.folder / "export", dirs_exist_ok=True)
    other.result = stages.result
    return other


def test_variants_that_hold_what_they_promise_are_kept_beside_the_float_artifact(made: WorkerStages) -> None:
    assert made.result is not None and set(made.result.artifacts) == {"onnx", DYNAMIC, STATIC}
    assert "calibrated on 256 training samples" in made.result.artifacts[STATIC].method
    sizes = {kind: (made.folder / "export" / item.file).stat().st_size for kind, item in made.result.artifacts.items()}
    assert max(sizes[DYNAMIC], sizes[STATIC]) < 0.5 * sizes["onnx"]

    result = made.validate()
    assert result.passed
    for kind in (DYNAMIC, STATIC):
        found = result.int8[kind]
        assert found.reason == "" and found.sqnr_db >= 20 and found.agreement is not None and found.agreement >= 0.95
        assert result.metrics[kind]["accuracy"] == pytest.approx(result.metrics["onnx"]["accuracy"], abs=0.02)
        mine = [verdict for verdict in result.verdicts if verdict.format == kind]
        assert {verdict.gate for verdict in mine} == {"int8", "accuracy"}
        # Rounding to 8 bits is not parity: nothing says that it would pass for that.
        assert all(verdict.passed for verdict in mine)


def test_ranges_come_from_training_data_and_not_from_validation(made: WorkerStages) -> None:
    validation = load_file(made.folder / "export" / VALIDATION)["input.input"]
    assert float(validation.max()) <= 0.7
    graph = onnx.load(made.folder / "export" / INT8_FILES[STATIC]).graph
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "input")
    (scale,) = (numpy_helper.to_array(item) for item in graph.initializer if item.name == first.input[1])
    # 8 bits for 0..1, or 7: not for 0..0.7.
    assert any(float(scale) == pytest.approx(1 / steps, rel=0.02) for steps in (127, 255))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"sqnr_db": 90}, r"SQNR \d+\.\d dB, expected at least 90"),
        ({"metric_loss": 0, "agreement": 1, "flip_margin": 0, "sqnr_db": 89}, "SQNR"),
    ],
)
def test_a_variant_outside_its_limits_is_dropped_and_the_float_artifact_stays(
    made: WorkerStages, limits: dict[str, float], reason: str
) -> None:
    other = limited(made, **limits)
    result = other.validate()
    assert result.passed
    assert set(result.metrics) == {"onnx"} and {verdict.format for verdict in result.verdicts} == {"onnx"}
    for kind in (DYNAMIC, STATIC):
        assert re.search(reason, result.int8[kind].reason)


def test_a_variant_calibrated_on_the_wrong_data_loses_accuracy_and_is_dropped(made: WorkerStages) -> None:
    other = limited(made)
    export = other.folder / "export"
    wrong = [{"input": torch.full((8, 1, 8, 8), 0.01)}]
    quantize.onnx_static(export / FORMAT_FILES["onnx"], export / INT8_FILES[STATIC], wrong)
    result = other.validate()
    assert result.passed and result.int8[DYNAMIC].reason == ""
    found = result.int8[STATIC]
    assert "SQNR" in found.reason and "accuracy loses" in found.reason and "of its predictions" in found.reason
    # It would not pass the job's own gate either.
    assert "accuracy 0." in found.reason and ">= 0.9" in found.reason
    assert STATIC not in result.metrics


def test_a_variant_that_cannot_be_loaded_or_gives_other_shapes_is_dropped(made: WorkerStages) -> None:
    other = limited(made)
    (other.folder / "export" / INT8_FILES[STATIC]).write_bytes(b"no model")
    # A sound file of another model: it gives three outputs a sample less.
    model = onnx.load(other.folder / "export" / INT8_FILES[DYNAMIC])
    model.graph.output[0].name = model.graph.node[0].output[0]
    onnx.save(model, other.folder / "export" / INT8_FILES[DYNAMIC])
    result = other.validate()
    assert result.passed
    assert result.int8[STATIC].reason.startswith("it cannot be examined")
    assert result.int8[DYNAMIC].reason


def test_a_variant_that_is_not_faster_is_dropped_by_measurement_and_never_recommended(made: WorkerStages) -> None:
    assert made.result is not None
    export = made.folder / "export"
    timed = [
        Timed(name=kind, format=kind, file=str(export / item.file)) for kind, item in made.result.artifacts.items()
    ]
    request = measure_request(
        made.job, timed, golden=export / GOLDEN, inputs=made.result.inputs, serve="auto", project=made.project
    )
    folder = made.folder / "measure"
    folder.mkdir()
    # No variant is a thousand times as fast.
    asked = replace(request, speedup=1000.0)
    result: MeasureResult = decode(MeasureResult, asyncio.run(call_worker(made.fork_server, "measure", asked, folder)))
    assert set(result.too_slow) == {DYNAMIC, STATIC}
    assert "times at batch 1" in result.too_slow[STATIC] and "expected 1000 times" in result.too_slow[STATIC]
    assert set(result.serve.values()) == {"onnx"}
    assert set(result.speedups[STATIC]) == {str(speed.batch) for speed in result.measured[STATIC].speeds}


def test_what_cannot_be_quantized_is_left_out_with_the_reason(fork_server: ForkServer, tmp_path: Path) -> None:
    job = write_project(
        tmp_path / "project",
        train={"epochs": 1, "processes": 1, "batch_size": 32},
        export={"formats": ["onnx"], "quantize": {"formats": [STATIC], **LOOSE}},
    )
    stages = WorkerStages(fork_server, job, tmp_path / "run")
    stages.train()
    # There is no writing to it.
    (tmp_path / "run" / "export" / INT8_FILES[STATIC]).mkdir()
    stages.export("onnx")
    assert stages.result is not None and "onnx" in stages.result.artifacts
    assert STATIC in stages.result.left_out and stages.validate().passed


def test_a_variant_in_which_nothing_would_be_quantized_is_left_out_with_what_is(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    convolutions = CODE.replace("nn.Linear(64, 4)", "nn.Identity()").replace("nn.Linear(8 * 64, 64)", "nn.Identity()")
    job = write_project(
        tmp_path / "project",
        code=convolutions.replace("nn.Flatten()", "nn.AdaptiveAvgPool2d(1), nn.Flatten()"),
        train={"epochs": 1, "processes": 1, "batch_size": 32},
        export={"formats": ["onnx"], "quantize": LOOSE},
    )
    stages = WorkerStages(fork_server, job, tmp_path / "run")
    made = stages.export("onnx")
    assert stages.result is not None and set(made) == {"onnx", STATIC}
    why = stages.result.left_out[DYNAMIC]
    assert why.startswith("export.quantize: onnx-int8-dynamic: nothing was quantized: it takes MatMul, Gemm, LSTM, ")
    assert "the model's operators are Relu 2, Conv 1" in why and "onnx-int8-static quantizes convolutions" in why
    assert not (tmp_path / "run" / "export" / INT8_FILES[DYNAMIC]).exists()


def test_a_transformer_with_a_mask_is_quantized_around_its_attention(fork_server: ForkServer, tmp_path: Path) -> None:
    code = CODE.replace("nn.Sequential(\n", "Masked(\n").replace("def build_model", MASKED + "\n\ndef build_model")
    job = write_project(tmp_path / "project", code=code, export={"formats": ["onnx"], "quantize": LOOSE})
    stages = WorkerStages(fork_server, job, tmp_path / "run")
    made = stages.export("onnx")
    assert made["onnx"].method.endswith("ONNX opset 23") and set(made) == {"onnx", DYNAMIC, STATIC}
    found = stages.validate().int8
    assert all(found[kind].sqnr_db > 15 for kind in (DYNAMIC, STATIC)), found
    nodes = onnx.load(tmp_path / "run" / "export" / INT8_FILES[DYNAMIC]).graph.node
    kinds = {node.op_type for node in nodes}
    assert {"Attention", "MatMulInteger"} <= kinds


@pytest.mark.soak
def test_torchao_quantizes_the_exported_program_and_inductor_compiles_it(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    job = write_project(
        tmp_path / "project",
        train={"epochs": 1, "processes": 1, "batch_size": 32},
        export={"formats": ["pt2"], "quantize": {"formats": ["pt2e-int8"], **LOOSE}},
    )
    stages = WorkerStages(fork_server, job, tmp_path / "run")
    stages.train()
    artifacts = stages.export("pt2")
    assert stages.result is not None and stages.result.left_out == {}
    assert "torchao PT2E" in artifacts["pt2e-int8"].method
    found = stages.validate().int8["pt2e-int8"]
    # Loaded by torch alone, at every batch size.
    assert found.sqnr_db > 20


def test_a_compiled_program_that_is_not_the_quantized_one_is_noticed() -> None:
    program = torch.fx.symbolic_trace(torch.nn.Linear(4, 3).requires_grad_(False))
    inputs = {"x": torch.rand(8, 4)}
    right = quantize.agreement(lambda given: [program(given["x"]) + 1e-4], program, inputs)
    wrong = quantize.agreement(lambda given: [program(given["x"]).flip(0)], program, inputs)
    assert right > quantize.COMPILED_SQNR_DB > wrong


def test_without_torchao_the_variant_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    subject = Subject(model=torch.nn.Identity(), inputs={}, outputs=(), dims=(), project=PROJECT)
    with pytest.raises(UserError, match=r"pt2e-int8 needs torchao.*torchao>=0\.18"):
        quantize.pt2e(subject, tmp_path / "model", [])


def test_quantizing_leaves_what_its_process_logs_as_it_was(made: WorkerStages, tmp_path: Path) -> None:
    levels = [logging.getLogger(name).getEffectiveLevel() for name in ("", "train_and_ship.infra.small_files")]
    quantize.onnx_dynamic(made.folder / "export" / FORMAT_FILES["onnx"], tmp_path / "int8.onnx")
    assert [logging.getLogger(name).getEffectiveLevel() for name in ("", "train_and_ship.infra.small_files")] == levels


def noise(*pairs: tuple[Tensor, Tensor]) -> float:
    found = int8.Noise()
    for got, eager in pairs:
        found.add("output", got, eager)
    return found.decibels


def test_decibels_compare_the_power_of_the_signal_with_that_of_the_error() -> None:
    signal = torch.full((10,), 10.0)
    assert noise((signal + 0.1, signal)) == pytest.approx(40, abs=0.01)
    assert noise((signal, signal)) == int8.SILENT
    assert noise((signal * float("nan"), signal)) == -int8.SILENT
    assert noise((torch.ones(3), torch.zeros(3))) == -int8.SILENT


def test_a_flip_of_a_clear_decision_weighs_more_than_many_close_ones() -> None:
    eager = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.1, 0.0], [3.0, 0.0]])
    close, clear = int8.Predictions(), int8.Predictions()
    close.add(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.1], [3.0, 0.0]]), eager, torch.zeros(4))
    clear.add(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.1, 0.0], [0.0, 3.0]]), eager, torch.zeros(4))
    assert close.agreement == clear.agreement == 0.75
    assert close.flip_margin == pytest.approx(0.1) and clear.flip_margin == pytest.approx(3.0)


def test_every_limit_has_its_reason() -> None:
    limits = Int8Limits(sqnr_db=30, agreement=0.99, flip_margin=0.25, metric_loss=0.01, speedup=1.05)
    good = Int8(sqnr_db=35, golden_sqnr_db=34, agreement=0.995, flip_margin=0.1, losses={"accuracy": 0.01})
    assert int8.verdict(good, limits) == ""
    for change, reason in (
        ({"sqnr_db": 29.0}, "SQNR 29.0 dB"),
        ({"golden_sqnr_db": 29.0}, "SQNR 29.0 dB"),
        ({"agreement": 0.98}, "98.00% of its predictions"),
        ({"flip_margin": 0.3}, "0.30 times as sure"),
        ({"losses": {"mean_squared_error": 0.02}}, "mean_squared_error loses 0.02"),
    ):
        assert reason in int8.verdict(replace(good, **change), limits)
    assert int8.loss("accuracy", 0.9, 0.95) == pytest.approx(0.05)
    assert int8.loss("mean_squared_error", 1.1, 1.0) == pytest.approx(0.1)

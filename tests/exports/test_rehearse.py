"""What came back from the bucket, loaded and run in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchworker.contract import (
    GOLDEN,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    Resampling,
    TensorSpec,
    decode,
)
from torchworker.parity.reference import GROUP
from train_and_ship.infra.errors import WorkerError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.tasks.worker import call_worker

FEATURES, CLASSES, SAMPLES = 4, 3, 60


def model(seed: int, features: int = FEATURES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()


def release(folder: Path, made: nn.Module, features: int = FEATURES, name: str = "x") -> RehearsedRelease:
    """A torchscript artifact with golden outputs of the same model."""
    folder.mkdir(parents=True)
    torch.jit.script(made).save(str(folder / "model.torchscript"))  # type: ignore[no-untyped-call]
    golden = {}
    for size in (1, 8):
        inputs = torch.randn(size, features)
        with torch.no_grad():
            golden |= {f"batch_{size}.input.{name}": inputs, f"batch_{size}.eager.output": made(inputs)}
            exact = nn.Sequential(*made.children())
            golden[f"batch_{size}.float64.output"] = exact.double()(inputs.double())
            exact.float()
    save_file(golden, folder / GOLDEN)
    return RehearsedRelease(
        folder=str(folder),
        files={
            file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("model.torchscript", GOLDEN)
        },
        formats={"torchscript": "model.torchscript"},
        inputs=[TensorSpec(name=name, dtype="float32", shape=["batch", features])],
        outputs=[TensorSpec(name="output", dtype="float32", shape=["batch", CLASSES])],
    )


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    torch.manual_seed(9)
    path = tmp_path / "validation.safetensors"
    save_file({"input.x": torch.randn(SAMPLES, FEATURES), "target": torch.randint(0, CLASSES, (SAMPLES,))}, path)
    return path


def accuracy(made: nn.Module, validation: Path) -> float:
    tensors = load_file(validation)
    with torch.no_grad():
        hits = made(tensors["input.x"]).argmax(1) == tensors["target"]
    return float(hits.float().mean())


def rehearsal(
    fork_server: ForkServer, folder: Path, candidate: RehearsedRelease, live: RehearsedRelease | None, **changes: Any
) -> RehearseResult:
    arguments: dict[str, Any] = {
        "validation": None,
        "moved": None,
        "metrics": ["accuracy"],
        "forbidden_modules": ["plain"],
        "forbidden_folder": str(folder / "project"),
        "threads": 1,
        **changes,
    }
    request = RehearseRequest(candidate=candidate, live=live, **arguments)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    result: RehearseResult = decode(RehearseResult, asyncio.run(call_worker(fork_server, "rehearse", request, work)))
    return result


def test_candidate_and_live_release_are_scored_on_the_same_samples(
    fork_server: ForkServer, tmp_path: Path, validation: Path
) -> None:
    candidate, live = release(tmp_path / "a", model(1)), release(tmp_path / "b", model(2))
    result = rehearsal(fork_server, tmp_path, candidate, live, validation=str(validation))
    assert result.passed and len(result.verdicts) == 2 and result.samples == SAMPLES
    assert result.candidate["torchscript"]["accuracy"] == pytest.approx(accuracy(model(1), validation))
    assert result.live["torchscript"]["accuracy"] == pytest.approx(accuracy(model(2), validation))
    assert result.candidate != result.live and result.live_problem == ""


def test_samples_that_come_in_groups_have_an_interval_over_groups(
    fork_server: ForkServer, tmp_path: Path, validation: Path
) -> None:
    candidate, live = release(tmp_path / "a", model(1)), release(tmp_path / "b", model(2))
    asked = Resampling(resamples=200, confidence=0.95, seed=0)
    found = {}
    for groups in (0, 10, 5):
        path = tmp_path / f"{groups}.safetensors"
        more = {GROUP: torch.arange(SAMPLES) * groups // SAMPLES} if groups else {}
        save_file({**load_file(validation), **more}, path)
        found[groups] = rehearsal(fork_server, tmp_path, candidate, live, validation=str(path), resampling=asked)
    assert {groups: result.groups for groups, result in found.items()} == {0: 0, 10: 10, 5: 5}
    assert found[0].intervals["accuracy"] != found[10].intervals["accuracy"]
    assert found[5].passed and found[5].intervals == {}


def test_without_validation_samples_the_golden_outputs_are_still_asked_for(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    result = rehearsal(fork_server, tmp_path, release(tmp_path / "a", model(1)), release(tmp_path / "b", model(2)))
    assert result.passed and result.candidate == {} and result.live == {} and result.samples == 0


def test_an_artifact_that_does_not_give_the_golden_outputs_fails(fork_server: ForkServer, tmp_path: Path) -> None:
    candidate, other = release(tmp_path / "a", model(1)), release(tmp_path / "b", model(2))
    mixed = replace(candidate, files={}, formats={"torchscript": str(Path(other.folder) / "model.torchscript")})
    result = rehearsal(fork_server, tmp_path, mixed, None)
    assert not result.passed
    assert all(verdict.measured is not None and verdict.measured > 1 for verdict in result.verdicts)


def test_an_artifact_that_cannot_be_loaded_fails_with_the_reason(fork_server: ForkServer, tmp_path: Path) -> None:
    candidate = release(tmp_path / "a", model(1))
    (tmp_path / "a" / "model.torchscript").write_bytes(b"no archive")
    result = rehearsal(fork_server, tmp_path, replace(candidate, files={}), None)
    (verdict,) = result.verdicts
    assert not result.passed and verdict.case == "load" and verdict.measured is None and verdict.note


def test_a_file_that_is_not_what_the_manifest_says_is_never_loaded(fork_server: ForkServer, tmp_path: Path) -> None:
    candidate = release(tmp_path / "a", model(1))
    path = tmp_path / "a" / "model.torchscript"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(WorkerError, match=r"model\.torchscript: expected SHA-256 \w+, got"):
        rehearsal(fork_server, tmp_path, candidate, None)


@pytest.mark.parametrize(
    ("features", "name", "reason"),
    [(5, "x", r"its input x is float32 \['batch', 5\], the candidate's float32 \[batch, 4\]"),
     (FEATURES, "image", "its inputs are image, the candidate's x")],
)  # fmt: skip
def test_a_live_release_with_other_inputs_cannot_be_scored_and_says_why(
    fork_server: ForkServer, tmp_path: Path, validation: Path, features: int, name: str, reason: str
) -> None:
    live = release(tmp_path / "b", model(2, features), features, name)
    result = rehearsal(fork_server, tmp_path, release(tmp_path / "a", model(1)), live, validation=str(validation))
    assert result.passed and result.live == {}
    assert re.search(reason, result.live_problem)


def test_a_live_release_that_cannot_be_loaded_does_not_fail_the_candidate(
    fork_server: ForkServer, tmp_path: Path, validation: Path
) -> None:
    damaged, candidate = release(tmp_path / "b", model(2)), release(tmp_path / "a", model(1))
    artifact = tmp_path / "b" / "model.torchscript"
    artifact.write_bytes(b"no archive")
    # One that was made so, and one that was damaged since.
    made_so = replace(damaged, files={artifact.name: hashlib.sha256(artifact.read_bytes()).hexdigest()})
    for live, said in ((made_so, "torchscript: "), (damaged, r"it is broken: \S+/model.torchscript: expected \S+")):
        result = rehearsal(fork_server, tmp_path, candidate, live, validation=str(validation))
        assert result.passed and result.live == {} and re.match(said, result.live_problem), result.live_problem

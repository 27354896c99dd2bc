"""A candidate and a live release that have other classes are compared on the same labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.projects import write_project
from torchworker.contract import RehearsedRelease, RehearseRequest, RehearseResult, TensorSpec
from torchworker.runtimes.load import load_artifact
from torchworker.stages.rehearse import Scores, _classes, _means, _score, _score_live
from train_and_ship.registry.gates import live_score, worst
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.kind import Kind

INPUTS = [TensorSpec(name="x", dtype="float32", shape=["batch", 5])]
FILE = "model.torchscript"


def release(folder: Path, classes: int) -> RehearsedRelease:
    """A TorchScript file that answers with the largest of its first inputs: always right about its own classes."""
    folder.mkdir()
    model = nn.Linear(5, classes, bias=False)
    nn.init.eye_(model.weight)
    torch.jit.save(torch.jit.trace(model, torch.zeros(2, 5)), folder / FILE)
    outputs = [TensorSpec(name="output", dtype="float32", shape=["batch", classes])]
    return RehearsedRelease(folder=str(folder), formats={"torchscript": FILE}, inputs=INPUTS, files={}, outputs=outputs)


def compared(tmp_path: Path, mine: int, theirs: int, labels: Tensor) -> RehearseResult:
    """As `rehearse` compares two releases, of so many classes."""
    request = RehearseRequest(
        candidate=release(tmp_path / "candidate", mine), live=release(tmp_path / "live", theirs), validation="file",
        moved=None, metrics=["accuracy"], forbidden_modules=[], forbidden_folder="", threads=1,
    )  # fmt: skip
    validation = {"input.x": torch.eye(5)[labels.clamp(0, 4)], "target": labels}
    classes = _classes(request, validation)
    call = load_artifact("torchscript", Path(request.candidate.folder) / FILE, 1)
    (candidate,) = _score(call, validation, request.candidate, request.metrics, 4, [classes])
    live: Scores = {}
    own: Scores = {}
    assert _score_live(request, validation, 4, classes, live, own) == ""
    return RehearseResult(
        verdicts=[], candidate=_means({"torchscript": candidate}), live=_means(live), live_own=_means(own),
        live_problem="", samples=len(labels), live_spread={"accuracy": 0.0}, constant={"accuracy": 0.2},
    )  # fmt: skip


@pytest.mark.parametrize(("mine", "theirs", "expected"), [(5, 3, (1.0, 0.6)), (3, 5, (0.6, 1.0)), (5, 5, (1.0, 1.0))])
def test_a_model_is_wrong_about_the_classes_that_only_the_other_has(
    tmp_path: Path, mine: int, theirs: int, expected: tuple[float, float]
) -> None:
    # -100 and 255 are padding to both.
    labels = torch.tensor([0, 1, 2, 3, 4] * 20 + [-100, 255] * 10)
    result = compared(tmp_path, mine, theirs, labels)
    job, _ = load_job(write_project(tmp_path / "job"))
    got = [worst(job, scores)["accuracy"] for scores in (result.candidate, result.live)]
    assert got == pytest.approx(list(expected))


def test_a_live_release_is_held_against_its_own_record_on_its_own_classes(tmp_path: Path) -> None:
    result = compared(tmp_path, 5, 2, torch.tensor([0, 1, 2, 3, 4] * 20))
    job, _ = load_job(write_project(tmp_path / "job"))
    # 0.4 of all, as new classes are most of the data; of its own it knows all.
    assert worst(job, result.live)["accuracy"] == pytest.approx(0.4)
    assert live_score(job, result).scored == {"accuracy": 1.0}
    assert live_score(job, result).contradictions(Kind(metrics={"accuracy": 1.0}, samples=100), job.direction) == []

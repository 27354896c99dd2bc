"""What is done otherwise with a large model gives what it gives with a small one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.parity import CODE, NOTHING
from torchworker.contract import Artifact, ExportRequest, Project, Reply
from torchworker.exporters.subject import Subject
from torchworker.project import kept_state, weights
from torchworker.project.kept_state import changed, state_of
from torchworker.stages import export

FORMATS = ("torchscript", "onnx", "pt2")


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, largest: int) -> tuple[list[str], dict[str, str]]:
    """Which formats began and ended, in their order, and what failed. The second one's process is killed."""

    def child(kind: str, request: ExportRequest, subject: Subject) -> int:
        with (folder / "log").open("a") as log:
            log.write(f"{kind} begins\n")
            log.flush()
            time.sleep(0.02)
            if kind == "onnx":
                os.kill(os.getpid(), signal.SIGKILL)
            log.write(f"{kind} ends\n")
        Reply(result=vars(Artifact(file=kind, method="", seconds=0.0))).write(folder / f"export-{kind}.json")
        return 0

    monkeypatch.setattr(export, "_export_child", child)
    # Whatever threads the tests before have left here.
    monkeypatch.setattr(export, "can_fork", lambda: True)
    monkeypatch.setattr(weights, "LARGE_BYTES", largest)
    torch.set_num_threads(1)
    project = Project(name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[])
    request = ExportRequest(
        project=project, folder=str(folder), weights="", formats=FORMATS, batch=4, seed=0, validation_limit=1
    )
    subject = Subject(model=nn.Linear(3, 2), inputs={}, outputs=[], dims=[], project=project)
    with export._Exports(FORMATS, request, subject) as exports:
        artifacts, failures = exports.made()
    assert list(artifacts) == ["torchscript", "pt2"]
    return (folder / "log").read_text().splitlines(), {kind: item.message for kind, item in failures.items()}


def test_formats_of_a_large_model_are_made_one_by_one_and_of_a_small_one_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = {"onnx": "the export to onnx ended with status -9 and left no result"}
    large = ["torchscript begins", "torchscript ends", "onnx begins", "pt2 begins", "pt2 ends"]
    assert made(tmp_path, monkeypatch, 4 * 8 - 1) == (large, killed)
    (tmp_path / "log").unlink()
    small, failed = made(tmp_path, monkeypatch, 4 * 8)
    assert (sorted(small), failed) == (sorted(large), killed)


def test_a_state_of_which_hashes_are_kept_has_changed_where_the_state_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1).to(memory_format=torch.channels_last), nn.BatchNorm2d(3), nn.Linear(1, 1))
    monkeypatch.setattr(kept_state, "LARGEST_COPY", 0)
    before = state_of(model)
    assert not any(isinstance(value, Tensor) for value in before.values()) and changed(before, model) == []
    with torch.no_grad():
        model[0].weight[2, 1] += 1e-6
        model[1].num_batches_tracked += 1
        model[2].weight = nn.Parameter(model[2].weight.double())
    assert changed(before, model) == ["0.weight", "2.weight", "1.num_batches_tracked"]

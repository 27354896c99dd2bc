"""`ship check` tries what a run does after training, on the untrained model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.support.fixture_types import Ship
from tests.support.projects import write_project

QUICK: dict[str, Any] = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "parity": {"cpp": "off"}}
HIDDEN = """
    class Hidden(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting() else 1)
    def build_model():
        return Hidden(4, 3)
"""


def test_check_captures_every_format_and_asks_the_artifacts(ship: Ship, tmp_path: Path) -> None:
    formats = {"export": {"formats": ["torchscript", "onnx"]}}
    shown = ship("check", str(write_project(tmp_path / "sound", **QUICK, **formats)), COLUMNS="200")
    assert shown.status == 0, shown.text
    assert "capturing the untrained model: torchscript, onnx …" in shown.output
    for kind in ("torchscript", "onnx"):
        assert re.search(rf"{kind}: made in \d.*{kind}: asked in \d", shown.output, re.DOTALL), kind
    assert "onnx: model.onnx, torch.export" in shown.output and "torchscript: model.torchscript" in shown.output

    # It trains, and is another model where it is exported: a run would say so when its training is over.
    job = str(write_project(tmp_path / "other", extra=HIDDEN, **QUICK, export={"formats": ["pt2"]}))
    refused = ship("check", job)
    assert refused.status == 2 and "Traceback" not in refused.text, refused.text
    assert "of the untrained model" in refused.text and "pt2 parity" in refused.text
    unasked = ship("check", job, "--no-export", COLUMNS="200")
    assert unasked.status == 0 and "pt2: model.pt2" in unasked.output, unasked.text


def test_a_training_of_hours_ends_at_once_when_its_model_cannot_be_exported(ship: Ship, tmp_path: Path) -> None:
    train = {"epochs": 10_000_000, "processes": 1, "batch_size": 32}
    job = write_project(tmp_path, extra=HIDDEN, name="hours", train=train, export={"formats": ["pt2"]})
    ended = ship("run", str(job))
    assert ended.status == 2 and "of the untrained model" in ended.text and "pt2 parity" in ended.text, ended.text

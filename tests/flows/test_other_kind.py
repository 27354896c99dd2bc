"""Nights after which what would go live is another kind of thing than what is live."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.retraining import Project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.decisions import KEPT

pytestmark = pytest.mark.soak
CLASSES = """
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset

NAMES = sorted(NIGHT.split())
CENTRES = {"bird": 0, "cat": 1, "zebra": 1, "dog": 2, "ant": 3}


def build_model():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, len(NAMES)))


def build_dataset(split):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    target = torch.randint(0, len(NAMES), (800 if split == "train" else 400,), generator=generator)
    inputs = torch.randn(len(target), 8, generator=generator)
    for index, name in enumerate(NAMES):
        inputs[target == index, CENTRES[name]] += 3
    return TensorDataset(inputs, target)
"""
NAMED = """

plain = build_dataset


def build_dataset(split):
    data = plain(split)
    data.classes = NAMES
    return data
"""
NUMBERED = {
    "train": {"epochs": 5, "processes": 1, "batch_size": 64, "learning_rate": 0.01, "metrics": ["accuracy"]},
    "gates": {"accuracy": {"min": 0.8, "vs_live": -0.02}},
}
NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        # here
        return self.b(h)


build_model = Net


def build_dataset(split):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    inputs = torch.randn(256 if split == "train" else 96, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())
"""


def night(names: str, more: str = "") -> str:
    return CLASSES.replace("NIGHT", repr(names)) + more


def test_classes_that_are_numbered_anew_stay_out_until_somebody_has_said_yes(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    project = Project(tmp_path, store, "numbered")
    assert project.retrain(code=night("bird cat dog"), **NUMBERED).name == "Promoted"
    first = project.live
    # One class more: other outputs, other numbers, and a live release that cannot be what it was.
    assert project.retrain(code=night("ant bird cat dog"), **NUMBERED).name == "Kept"
    decision = project.decisions()[-1]
    assert decision.decision == KEPT and project.live == first
    for part in (
        "signature: output output: float32 [batch, 3] → float32 [batch, 4]",
        "labels: trained on: 3 (0, 1, 2) → 4 (0, 1, 2, 3)", "live_score: accuracy of the live release: 0.9",
        "--allow signature --allow labels --allow live_score",
    ):  # fmt: skip
        assert part in decision.why, part
    # As many classes as before, of which two have changed places: only the scores can tell.
    assert project.retrain(code=night("bird zebra dog"), **NUMBERED).name == "Kept"
    assert (
        "kind" in (why := project.decisions()[-1].why) and "--allow live_score --why" in why and "signature" not in why
    )
    # The same is not tried again, unless it is allowed by then.
    again = project.retrain(code=night("bird zebra dog"), **NUMBERED)
    assert again.name == "Skipped"
    allowing = {**NUMBERED, "release": {"allow": ["live_score"]}}
    assert project.retrain(code=night("bird zebra dog"), **allowing).name == "Promoted"
    assert project.live.verdicts["live_score vs live"].endswith("(allowed by release.allow)")


def test_names_of_classes_in_another_order_are_named(tmp_path: Path, store: ObjectStore, stack: Settings) -> None:
    project = Project(tmp_path, store, "named")
    always = {**NUMBERED, "gates": {}, "release": {"policy": "always", "allow": ["live_score"]}}
    assert project.retrain(code=night("bird cat dog", NAMED), **always).name == "Promoted"
    assert project.retrain(code=night("bird zebra dog", NAMED), **always).name == "Kept"
    why = project.decisions()[-1].why
    assert "labels: class 1: cat of 3 → dog of 3" in why and "--allow labels --why" in why


def test_a_night_that_loses_formats_keeps_what_servers_have(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    project = Project(tmp_path, store, "losing")
    job = {
        "train": {"epochs": 2, "processes": 1, "batch_size": 32, "learning_rate": 0.02},
        "export": {"formats": "auto", "serve": "none"},
        "release": {"policy": "always"},
    }
    assert project.retrain(code=NET, **job).name == "Promoted"
    branch = "if bool(h.sum() > 1e9):\n            h = h * 0"
    assert project.retrain(code=NET.replace("# here", branch), **job).name == "Kept"
    why = project.decisions()[-1].why
    assert "formats: format onnx: model.onnx → none" in why and "format torchscript" not in why

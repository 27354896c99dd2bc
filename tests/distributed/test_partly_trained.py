"""Layers that stay as they are, whichever way ranks share the model, and what the check says of them and of groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.projects import RESIDUAL, write_project
from tests.support.training import Train
from train_and_ship.infra.errors import JobError
from train_and_ship.ship.check import check

BACKBONE = (
    RESIDUAL
    + """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 8), Block(8), nn.Dropout(0.5), Block(8))
            self.head = nn.Linear(8, 3)
        def forward(self, x):
            return self.head(self.backbone(x))
    def build_model():
        return Net()
"""
)
PLAN: dict[str, Any] = {
    "epochs": 2,
    "processes": 2,
    "batch_size": 32,
    "accumulate": 2,
    "clip_norm": 0.5,
    "ema": 0.5,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "freeze": ["backbone.*"],
}


def test_a_frozen_backbone_ships_bit_by_bit_as_it_was_whichever_way_ranks_share_it(
    train: Train, tmp_path: Path
) -> None:
    train(write_project(tmp_path / "live", extra=BACKBONE, train={"epochs": 1, "processes": 1, "seed": 1}))
    live = tmp_path / "train0" / "weights.safetensors"
    told = train(write_project(tmp_path / "ddp", extra=BACKBONE, train=PLAN), start=live).notes
    train(write_project(tmp_path / "fsdp", extra=BACKBONE, train={**PLAN, "strategy": "fsdp"}), start=live)

    first, whole, gathered = (load_file(tmp_path / f"train{n}" / "weights.safetensors") for n in range(3))
    assert "train.freeze: 27 of 243 parameters are trained" in told
    assert first["backbone.1.norm.running_mean"].abs().max() > 0.01, "there is something to keep"
    for name, tensor in first.items():
        assert torch.equal(whole[name], tensor) is name.startswith("backbone."), name
        assert torch.equal(gathered[name], tensor) is name.startswith("backbone."), name
        torch.testing.assert_close(gathered[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_check_says_how_much_is_trained_and_refuses_a_pattern_that_names_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"epochs": 1, "processes": 1, "batch_size": 32}
    check(write_project(tmp_path / "p", train={**plan, "freeze": ["0.*"]}), export=False)
    assert "train.freeze: 27 of 67 parameters are trained" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(JobError, match=r"train\.freeze: '7\.\*' names no parameter"):
        check(write_project(tmp_path / "q", train={**plan, "freeze": ["7.*"]}), export=False)


def test_check_refuses_a_group_before_anything_is_trained(tmp_path: Path) -> None:
    groups = [{"names": ["0.*"], "args": {"betas": [0, 1]}}]
    path = write_project(tmp_path, train={"epochs": 1, "optimizer": "sgd", "groups": groups})
    with pytest.raises(JobError, match=r"train\.groups\[0\]: SGD has no option 'betas'"):
        check(path, export=False)

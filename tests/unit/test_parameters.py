"""Which parameters of a model are trained, by patterns of their names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.projects import write_project
from torchworker.contract import Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.parameters import freeze, set_training
from torchworker.training.trial import refusal_of_one
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import train_settings

NOTHING = Reference(target="plain:build_model", where="model.factory")
PROJECT = Project(name="plain", folder="", model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[])


class Net(nn.Module):
    """A backbone with state of its own, a norm beside it, a recurrent layer and a head that shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.norm, self.rnn = nn.BatchNorm1d(4), nn.LSTM(4, 4)
        self.head, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.head(self.backbone(x)))  # type: ignore[no-any-return]


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_patterns_name_parameters_whatever_their_modules_are_and_under_all_of_their_names() -> None:
    model = Net()
    (note,) = freeze(model, ["backbone.*", "*.bias", "rnn.weight_?h_l0", "again.weight"], PROJECT)
    assert trained(model) == ["norm.weight", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]
    assert note == "train.freeze: 36 of 220 parameters are trained"
    assert freeze(model, [], PROJECT) == [], "what the factory froze is nobody's news"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            ["backbon.*"],
            r"freeze: 'backbon\.\*' names no parameter of what plain:build_model makes; did you mean ba",
        ),
        (["head"], r"'head' names no parameter .*did you mean head\.\*"),
        (["Backbone.*"], r"'Backbone\.\*' names no parameter"),
        (["zzz"], r"its parameters are backbone\.0\.weight, .* and 9 more"),
        (["backbone.*", "*"], r"backbone\.\*, \* leaves nothing of plain:build_model to train; expected at least one"),
    ],
)
def test_a_pattern_that_names_nothing_or_all_is_refused(patterns: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        freeze(Net(), patterns, PROJECT)


def test_a_frozen_module_keeps_its_statistics_and_its_dropout_off_in_training() -> None:
    model = Net()
    set_training(model, [])
    assert all(module.training for module in model.modules())
    set_training(model, ["backbone.*", "norm.weight", "rnn.*"])
    assert [name for name, module in model.named_modules() if not module.training] == [
        "backbone", "backbone.0", "backbone.1", "backbone.2",
    ]  # fmt: skip
    x = torch.randn(8, 4)
    assert torch.equal(model.backbone(x), copy.deepcopy(model).eval().backbone(x))
    assert int(model.backbone[1].num_batches_tracked) == 0


def test_a_frozen_batch_norm_may_see_one_sample_alone() -> None:
    model, loss = Net(), nn.functional.cross_entropy
    batch = torch.randn(2, 4), torch.zeros(2, dtype=torch.long)
    assert "more than 1 value per channel" in refusal_of_one(model, loss, batch, PROJECT)
    assert refusal_of_one(model, loss, batch, PROJECT, ["backbone.*"]) == ""


def test_a_job_without_the_key_has_the_digest_that_it_had(tmp_path: Path) -> None:
    job, _ = load_job(write_project(tmp_path))
    assert "freeze" not in job.model_dump(mode="json")["train"]
    frozen, _ = load_job(write_project(tmp_path, train={"epochs": 1, "freeze": ["0.*"]}))
    assert frozen.model_dump(mode="json")["train"]["freeze"] == ["0.*"]
    assert train_settings(frozen).freeze == ("0.*",)

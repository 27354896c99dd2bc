"""Which parameters of a model are trained, by patterns of their names."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.projects import write_project
from torchworker.contract import Project, Reference, TrainSettings, decode
from torchworker.process.failure import UserError
from torchworker.project.parameters import freeze, set_training
from torchworker.training.trial import refusal_of_one
from train_and_ship.registry.job.job import Job
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


def test_a_job_without_the_keys_has_the_digest_that_it_had_and_one_with_them_is_read_back_from_its_record(
    tmp_path: Path,
) -> None:
    later = {"freeze", "groups", "warmup", "drop_last", "sampler", "sharded"}
    plain = load_job(write_project(tmp_path))[0].model_dump(mode="json")
    assert not later & (plain["train"].keys() | plain["data"].keys())
    groups = [{"names": ["*.bias"], "weight_decay": 0}, {"names": ["2.*"], "args": {"betas": [0.8, 0.9]}}]
    train = {"epochs": 1, "freeze": ["0.*"], "groups": groups, "schedule": "warmup_cosine", "warmup": 2}
    train |= {"drop_last": True, "metrics": ["f1_score"]}
    data = {"factory": "plain:build_dataset", "sampler": {"factory": "plain:weights", "args": {"power": 0.5}}}
    job, _ = load_job(write_project(tmp_path, train=train, data=data))
    record = json.loads(json.dumps(job.model_dump(mode="json"), sort_keys=True))
    again = Job.from_record(record)
    assert again == job and again.digest() == job.digest()
    turned, _ = load_job(write_project(tmp_path, train={**train, "groups": groups[::-1]}, data=data))
    assert turned.training_digest() != job.training_digest(), "the first of two groups counts"
    settings = decode(TrainSettings, json.loads(json.dumps(dataclasses.asdict(train_settings(job)))))
    assert (settings.freeze, settings.warmup, settings.drop_last) == (("0.*",), 2, True)
    assert [group.options for group in settings.groups] == [{"weight_decay": 0}, {"betas": [0.8, 0.9]}]

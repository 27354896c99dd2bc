"""Optimizers with groups of parameters, and what factories of them are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.projects import write_project
from torchworker.contract import Project, TrainSettings
from torchworker.process.failure import UserError
from torchworker.project.parameters import freeze
from torchworker.training.optimizer import build_optimizer, build_schedule
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings

ONE: dict[str, Any] = {"epochs": 1, "processes": 1, "batch_size": 32}
BIAS, HEAD = {"names": ["*.bias"], "weight_decay": 0}, {"names": ["head.*"], "learning_rate": 0.1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))  # type: ignore[no-any-return]


def opened(folder: Path, **train: Any) -> tuple[Project, TrainSettings]:
    job, project = load_job(write_project(folder, train={**ONE, **train}))
    return project_of(job, project), train_settings(job)


def options_of(optimizer: torch.optim.Optimizer, model: nn.Module, option: str) -> dict[str, Any]:
    """By name of the parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(item)]: group[option] for group in optimizer.param_groups for item in group["params"]}


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam", "fused": True},
        {"optimizer": {"factory": "torch.optim:AdamW"}},
    ],
)
def test_parameters_have_the_options_of_the_groups_that_name_them(tmp_path: Path, train: dict[str, Any]) -> None:
    rest = {"names": ["*"], "weight_decay": 0.5, "args": {"betas": [0.8, 0.9]}}
    project, settings = opened(tmp_path, groups=[BIAS, HEAD, rest], **train)
    model = Net()
    optimizer = build_optimizer(project, settings, model)
    assert options_of(optimizer, model, "weight_decay") == {
        "body.weight": 0.5, "norm.weight": 0.5, "head.weight": 0.5, "body.bias": 0, "norm.bias": 0, "head.bias": 0,
    }  # fmt: skip
    assert options_of(optimizer, model, "lr") == {
        name: 0.1 if name.startswith("head.") else 1e-3 for name, _ in model.named_parameters()
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def test_the_rate_that_is_shown_is_of_what_no_group_names(tmp_path: Path) -> None:
    project, settings = opened(tmp_path, groups=[{"names": ["body.*"], "learning_rate": 0.1}])
    assert [group["lr"] for group in build_optimizer(project, settings, Net()).param_groups] == [1e-3, 0.1]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_schedule_scales_each_groups_rate_alike(tmp_path: Path, schedule: str) -> None:
    project, settings = opened(tmp_path, groups=[HEAD], schedule=schedule)
    optimizer = build_optimizer(project, settings, Net())
    made = build_schedule(project, settings, optimizer, steps=4)
    for _ in range(3):
        optimizer.step()
        made.step()
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert high == pytest.approx(100 * low) and low > 0


def test_a_schedule_that_levels_the_groups_is_refused(tmp_path: Path) -> None:
    one = {"factory": "torch.optim.lr_scheduler:OneCycleLR", "args": {"max_lr": 1.0, "cycle_momentum": False}}
    project, settings = opened(tmp_path, groups=[HEAD], schedule=one)
    with pytest.raises(UserError, match=r"OneCycleLR gives all parameters one learning rate, .*has 0\.001, 0\.1;"):
        build_schedule(project, settings, build_optimizer(project, settings, Net()), steps=4)
    each = {**one, "args": {**one["args"], "max_lr": [1.0, 2.0]}}
    project, settings = opened(tmp_path, groups=[HEAD], schedule=each)
    build_schedule(project, settings, build_optimizer(project, settings, Net()), steps=4)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (
            {"groups": [{"names": ["haed.*"], "weight_decay": 0}]},
            r"groups\[0\]\.names: 'haed\.\*' .*mean head\.\*",
        ),
        (
            {"groups": [HEAD, {"names": ["body.*"], "weight_decay": 0}]},
            r"\[1\]\.names: 'body\.\*' names frozen param",
        ),
        (
            {"groups": [{"names": ["*"], "args": {"momentm": 1}}]},
            r"groups\[0\]: Adam has no option 'momentm'; it",
        ),
        (
            {"optimizer": {"factory": "torch.optim:Rprop"}, "groups": [{"names": ["*"], "weight_decay": 0}]},
            "Rprop has no option 'weight_decay'",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path: Path, train: dict[str, Any], expected: str) -> None:
    project, settings = opened(tmp_path, **train)
    model = Net()
    freeze(model, ["body.*"], project)
    with pytest.raises(UserError, match=expected):
        build_optimizer(project, settings, model)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"names": ["*"]}, "expected learning_rate, weight_decay or args"),
        ({"names": [], "weight_decay": 0}, "train.groups.0.names"),
        ({"names": ["*"], "weight_decy": 0}, "train.groups.0.weight_decy: unknown key; did you mean weight_decay?"),
        ({"names": ["*"], "args": {"lr": 1}}, "no lr in args: it has a key of its own, learning_rate"),
        ({"names": ["*"], "weight_decay": -1}, "greater than or equal to 0"),
    ],
)
def test_groups_that_say_nothing_sensible_are_told_by_their_key(
    tmp_path: Path, group: dict[str, Any], expected: str
) -> None:
    with pytest.raises(JobError) as refusal:
        opened(tmp_path, groups=[group])
    assert expected in str(refusal.value)


def plain(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def by_name(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    assert [name for name, _ in named_parameters] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    return torch.optim.SGD([item for _, item in named_parameters], lr=lr)


def of_model(lr: float, model: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.norm.parameters(), *model.head.parameters()], lr=lr)


def of_both(model: Net, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    assert isinstance(model, Net)
    return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("factory", [plain, by_name, of_model, of_both])
def test_a_factory_is_given_what_it_asks_for_by_name(tmp_path: Path, factory: Any) -> None:
    project, settings = opened(tmp_path, optimizer={"factory": f"{__name__}:{factory.__name__}"}, learning_rate=0.5)
    model = Net()
    freeze(model, ["body.*"], project)
    optimizer = build_optimizer(project, settings, model)
    assert options_of(optimizer, model, "lr") == {
        name: 0.5 for name, _ in model.named_parameters() if not name.startswith("body.")
    }
    if factory in (plain, of_both):
        project, settings = opened(tmp_path, optimizer={"factory": f"{__name__}:{factory.__name__}"}, groups=[HEAD])
        assert options_of(build_optimizer(project, settings, model), model, "lr")["head.bias"] == 0.1


@pytest.mark.parametrize("factory", [by_name, of_model])
def test_a_factory_that_groups_by_itself_is_not_given_groups(tmp_path: Path, factory: Any) -> None:
    project, settings = opened(tmp_path, optimizer={"factory": f"{__name__}:{factory.__name__}"}, groups=[HEAD])
    with pytest.raises(UserError, match=r"train\.groups: .* asks for (model|named_parameters), and so makes"):
        build_optimizer(project, settings, Net())


def rates(folder: Path, steps: int, **train: Any) -> list[float]:
    """Of each optimizer step, as parts of the learning rate."""
    project, settings = opened(folder, learning_rate=1.0, optimizer="sgd", **train)
    optimizer = build_optimizer(project, settings, Net())
    schedule = build_schedule(project, settings, optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("train", "steps", "expected"),
    [
        ({"schedule": "warmup_cosine", "warmup": 3}, 7, [0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "cosine", "warmup": 0.4}, 7, [0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "linear", "warmup": 1}, 5, [0.5, 1, 0.75, 0.5, 0.25]),
        ({"warmup": 2}, 4, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "warmup_cosine"}, 20, [0.5, *(0.5 + 0.5 * math.cos(math.pi * step / 19) for step in range(19))]),
        ({"schedule": "cosine", "warmup": 0}, 2, [1, 0.5]),
    ],
    ids=["steps", "a share", "to a line", "to a flat rate", "a share of its own", "none"],
)
def test_the_rate_rises_in_a_line_and_then_follows_its_schedule(
    tmp_path: Path, train: dict[str, Any], steps: int, expected: list[float]
) -> None:
    assert rates(tmp_path, steps, **train) == pytest.approx(expected, abs=1e-6)


def test_each_group_warms_up_to_its_own_rate(tmp_path: Path) -> None:
    project, settings = opened(tmp_path, groups=[HEAD], schedule="warmup_cosine", warmup=3)
    optimizer = build_optimizer(project, settings, Net())
    build_schedule(project, settings, optimizer, steps=8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 4, 0.1 / 4])


def test_a_warm_up_that_is_not_over_before_the_training_is_refused(tmp_path: Path) -> None:
    project, settings = opened(tmp_path, warmup=5)
    with pytest.raises(UserError, match=r"warmup: expected less than the 5 optimizer steps .*got 5; give a share"):
        build_schedule(project, settings, build_optimizer(project, settings, Net()), steps=5)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"warmup": 1.5}, "train.warmup: expected a whole number of optimizer steps, or a share"),
        ({"warmup": -1}, "train.warmup: expected"),
        ({"warmup": True}, "train.warmup: expected"),
        ({"warmup": 3, "schedule": {"factory": "a:b"}}, "no warmup with a schedule of your own, a:b"),
        ({"warmup": 0, "schedule": "warmup_cosine"}, "schedule: cosine with warmup: 0"),
    ],
)
def test_a_warm_up_that_cannot_be_is_told_by_its_key(tmp_path: Path, train: dict[str, Any], expected: str) -> None:
    with pytest.raises(JobError) as refusal:
        opened(tmp_path, **train)
    assert expected in str(refusal.value)

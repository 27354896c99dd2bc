"""Which epoch ships, by what a job says and what a history holds, and what a moving average is of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.html_pages import checked
from tests.support.projects import write_project
from tests.support.run_report_files import page_of, run_files
from torchworker.contract import TrainResult, TrainSettings
from torchworker.process.failure import UserError
from torchworker.training.averaging import Averaging
from torchworker.training.best import best_epoch, stops_early
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.training_sections import shipped_words
from train_and_ship.registry.tracking.curves import shipped_of
from train_and_ship.tasks.requests import project_of, run_params, train_settings

NAN = float("nan")


def settings(folder: Path, release: dict[str, Any] | None = None, **train: Any) -> TrainSettings:
    return train_settings(load_job(write_project(folder, train={"epochs": 9, **train}, release=release))[0])


def history(name: str, *values: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, name: value} for epoch, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("train", "ships"),
    [
        ({}, "last"),
        ({"early_stopping": 2}, "best"),
        ({"weights": "best"}, "best"),
        ({"early_stopping": 2, "weights": "last"}, "last"),
    ],
)
def test_the_best_epoch_ships_where_early_stopping_is_set_and_else_the_last(
    tmp_path: Path, train: dict[str, Any], ships: str
) -> None:
    assert settings(tmp_path, **train).weights == ships


@pytest.mark.parametrize(
    ("train", "release", "watched"),
    [
        ({}, None, ("validation_accuracy", "higher")),
        ({"metrics": ["mean_absolute_error", "accuracy"]}, None, ("validation_mean_absolute_error", "lower")),
        ({"metrics": ["mean_absolute_error", "accuracy"]}, {"metric": "accuracy"}, ("validation_accuracy", "higher")),
        ({"metrics": []}, None, ("validation_loss", "lower")),
        ({"loss": {"factory": "plain:loss"}}, None, ("validation_loss", "lower")),
    ],
)
def test_what_is_watched_is_what_decides_releases_and_the_loss_where_there_is_no_metric(
    tmp_path: Path, train: dict[str, Any], release: dict[str, Any] | None, watched: tuple[str, str]
) -> None:
    found = settings(tmp_path, release, **train)
    assert (found.watched, found.watched_better) == watched


@pytest.mark.parametrize(
    ("train", "values", "best"),
    [
        ({}, (0.5, 0.7, 0.6), 2),
        ({"metrics": ["mean_squared_error"]}, (0.5, 0.7, 0.6), 1),
        ({}, (0.5, 0.7, 0.7), 2),
        ({}, (NAN, 0.2, NAN), 2),
        ({}, (NAN, NAN), 0),
        ({}, (), 0),
    ],
    ids=["higher", "lower", "a tie", "NaN among them", "only NaN", "nothing yet"],
)
def test_the_best_epoch_is_the_first_of_the_best_and_never_one_of_nan(
    tmp_path: Path, train: dict[str, Any], values: tuple[float, ...], best: int
) -> None:
    found = settings(tmp_path, **train)
    assert best_epoch(history(found.watched, *values), found) == best


def test_training_stops_as_many_epochs_after_the_best_as_the_job_says(tmp_path: Path) -> None:
    found = settings(tmp_path, early_stopping=2)
    rows = history("validation_accuracy", 0.5, 0.7, 0.7, 0.7)
    assert [stops_early(rows[:length], found) for length in range(5)] == [False, False, False, False, True]
    assert not stops_early(rows, settings(tmp_path))


@pytest.mark.parametrize("key", [{"weights": "best"}, {"ema": 0.9}], ids=lambda key: next(iter(key)))
def test_a_custom_loop_chooses_itself(tmp_path: Path, key: dict[str, Any]) -> None:
    train = {"entrypoint": "plain:main", **key}
    with pytest.raises(JobError, match=f"no {next(iter(key))} with entrypoint: only the built-in loop reads it"):
        load_job(write_project(tmp_path, train=train))


@pytest.mark.parametrize("decay", [0, 1, 1.5])
def test_a_decay_that_averages_nothing_or_never_is_refused(tmp_path: Path, decay: float) -> None:
    with pytest.raises(JobError, match=r"train\.ema"):
        load_job(write_project(tmp_path, train={"epochs": 1, "ema": decay}))


def test_what_is_watched_counts_for_training_only_where_it_chooses_something(tmp_path: Path) -> None:
    def digest(metric: str, **train: Any) -> str:
        measured = {"epochs": 1, "metrics": ["accuracy", "mean_squared_error"], **train}
        return load_job(write_project(tmp_path, train=measured, release={"metric": metric}))[0].training_digest()

    assert digest("accuracy") == digest("mean_squared_error")
    assert digest("accuracy", weights="best") != digest("mean_squared_error", weights="best")


def trained(**changes: Any) -> TrainResult:
    facts: dict[str, Any] = {
        "weights": "w", "train_samples": 1, "validation_samples": 1, "data_fingerprint": "", "environment": {},
        "notes": [], "history": history("validation_accuracy", 0.5, 0.75, 0.25), **changes,
    }  # fmt: skip
    return TrainResult(**facts)


CHOSEN = {"shipped_epoch": 2, "chosen_by": "validation_accuracy"}


@pytest.mark.parametrize(
    ("result", "said", "value"),
    [
        (CHOSEN, r"epoch 2 of 3: validation_accuracy 0\.75 is the best\. It was chosen .* optimistic", 0.75),
        ({"shipped_epoch": 3}, "epoch 3, the last", 0.25),
        # Of a custom loop, and of a run of before.
        ({}, "", 0.25),
    ],
    ids=["best", "last", "not known"],
)
def test_it_is_told_which_epoch_ships_and_that_a_choice_is_optimistic(
    tmp_path: Path, result: dict[str, Any], said: str, value: float
) -> None:
    job, _ = load_job(write_project(tmp_path))
    assert re.fullmatch(said, shipped_words(job, trained(**result)))
    assert shipped_of(trained(**result))["validation_accuracy"] == value


def test_the_report_and_the_params_of_the_run_say_it_too(tmp_path: Path) -> None:
    job, _ = load_job(write_project(tmp_path, train={"epochs": 3, "early_stopping": 1, "ema": 0.9}))
    files = replace(run_files(), job=job, trained=trained(**CHOSEN))
    text = checked(html(page_of(files))).text
    assert "epoch 2 of 3, averaged over the steps (ema 0.9): validation_accuracy 0.75 is the best" in text
    params = run_params(job)
    assert (params["train.weights"], params["train.ema"]) == ("best", "0.9")


class Net(nn.Module):
    """inputs [batch, 3] → [batch, 2]; with every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("index", torch.arange(50_000))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.norm(inputs)) + self.mask


def test_weights_and_running_statistics_are_averaged_and_other_buffers_are_as_in_the_model(tmp_path: Path) -> None:
    job, folder = load_job(write_project(tmp_path))
    torch.manual_seed(0)
    model = Net()
    average = Averaging(model, 0.9, project_of(job, folder))
    averaged = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "head.weight", "head.bias")
    expected: dict[str, torch.Tensor] = {}
    for _ in range(4):
        model(torch.randn(8, 3))
        with torch.no_grad():
            model.head.weight += torch.randn(2, 3)
        average.update(model)
        now = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] if expected else now[name] for name in averaged}

    found = average.model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    for name in found.keys() - expected.keys():
        assert torch.equal(found[name], model.state_dict()[name]), name


def test_a_model_that_cannot_be_copied_has_no_average_and_the_key_is_named(tmp_path: Path) -> None:
    job, folder = load_job(write_project(tmp_path))
    model = nn.Linear(3, 2)
    model.scaled = model.weight * 2
    with pytest.raises(UserError, match=r"train\.ema: plain:build_model makes a model that cannot be copied"):
        Averaging(model, 0.9, project_of(job, folder))

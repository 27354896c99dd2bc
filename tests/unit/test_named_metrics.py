"""Metrics of torchmetrics by name have the values that scikit-learn gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor

from tests.support.projects import write_project
from torchworker.contract import TORCHMETRICS
from torchworker.process.failure import UserError
from torchworker.project.named_metrics import measure
from torchworker.project.user_code import call_metric
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.check import check
from train_and_ship.tasks.requests import project_of, user_modules

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 4, (60,), generator=GENERATOR)
SCORES = torch.randn(60, 4, generator=GENERATOR) + torch.nn.functional.one_hot(LABELS, 4)
YES = torch.randint(0, 2, (60,), generator=GENERATOR)
# All between 0 and 1, where they look like chances and are logits: each is a yes.
LOGITS = torch.rand(60, generator=GENERATOR)
MIXED = 2 * torch.randn(60, generator=GENERATOR) + YES
NUMBERS = torch.rand(60, 2, generator=GENERATOR) + 1
ANSWERS = NUMBERS + 0.2 * torch.randn(60, 2, generator=GENERATOR)

BEST, CHANCES = SCORES.argmax(1), SCORES.softmax(1)
OF_CLASSES: dict[str, Callable[..., Any]] = {
    "f1_score": lambda truth, best: metrics.f1_score(truth, best, average="macro"),
    "precision": lambda truth, best: metrics.precision_score(truth, best, average="macro"),
    "recall": lambda truth, best: metrics.recall_score(truth, best, average="macro"),
    "specificity": lambda truth, best: np.mean(
        [metrics.recall_score(truth != label, best != label) for label in range(4)]
    ),
    "matthews_corrcoef": metrics.matthews_corrcoef,
    "cohen_kappa": metrics.cohen_kappa_score,
    "jaccard_index": lambda truth, best: metrics.jaccard_score(truth, best, average="macro"),
}
OF_YES: dict[str, Callable[..., Any]] = {
    "f1_score": metrics.f1_score,
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
    "specificity": lambda truth, best: metrics.recall_score(1 - truth, 1 - best),
    "matthews_corrcoef": metrics.matthews_corrcoef,
    "cohen_kappa": metrics.cohen_kappa_score,
    "jaccard_index": metrics.jaccard_score,
}
OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "r2_score": metrics.r2_score,
    "pearson_corrcoef": lambda truth, given: stats.pearsonr(truth, given)[0],
    "spearman_corrcoef": lambda truth, given: stats.spearmanr(truth, given)[0],
    "mean_absolute_percentage_error": metrics.mean_absolute_percentage_error,
}


def test_every_name_is_asked_of_what_it_is_for() -> None:
    assert TORCHMETRICS.keys() == OF_CLASSES.keys() | OF_NUMBERS.keys() | {"auroc", "average_precision"}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_metrics_of_classes_are_means_over_the_classes(name: str) -> None:
    assert measure(SCORES, LABELS, name) == pytest.approx(OF_CLASSES[name](LABELS, BEST), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auroc", metrics.roc_auc_score(LABELS, CHANCES, multi_class="ovr")),
        ("average_precision", metrics.average_precision_score(torch.eye(4)[LABELS], CHANCES)),
    ],
)
def test_metrics_by_rank_are_means_over_the_classes_that_occur(name: str, expected: float) -> None:
    assert measure(SCORES, LABELS, name) == pytest.approx(expected, abs=1e-6)
    # A fifth class that no sample has, and that no answer is, changes nothing.
    more = torch.cat([SCORES, torch.full((60, 1), -50.0)], 1)
    assert measure(more, LABELS, name) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "logits"),
    # Where all answers are yes, torchmetrics has another limit of Matthews' coefficient than 0.
    [(name, MIXED) for name in OF_YES] + [(name, LOGITS) for name in OF_YES if name != "matthews_corrcoef"],
)
def test_logits_of_yes_are_not_taken_for_chances(name: str, logits: Tensor) -> None:
    expected = pytest.approx(OF_YES[name](YES, (logits > 0).long()), abs=1e-6)
    for outputs, target in ((logits, YES), (logits[:, None], YES), (logits, YES.float())):
        assert measure(outputs, target, name) == expected


def test_metrics_by_rank_of_yes_are_scikit_learns() -> None:
    assert measure(MIXED, YES, "auroc") == pytest.approx(metrics.roc_auc_score(YES, MIXED))
    assert measure(MIXED, YES, "average_precision") == pytest.approx(metrics.average_precision_score(YES, MIXED))
    assert math.isnan(measure(MIXED, torch.ones(60), "auroc")), "there is nothing to rank"


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_metrics_of_numbers_are_means_over_those_of_a_sample(name: str) -> None:
    one = [OF_NUMBERS[name](NUMBERS[:, column], ANSWERS[:, column]) for column in (0, 1)]
    assert measure(ANSWERS[:, 0], NUMBERS[:, 0], name) == pytest.approx(one[0], rel=1e-4)
    assert measure(ANSWERS, NUMBERS, name) == pytest.approx(np.mean(one), rel=1e-4)


def test_padding_does_not_count() -> None:
    # [samples, classes, length], a third of it padding, of which any answer is right.
    outputs, target = SCORES.reshape(20, 3, 4).transpose(1, 2), LABELS.reshape(20, 3).clone()
    target[:, 2] = -100
    kept = LABELS.reshape(20, 3)[:, :2].flatten()
    best = BEST.reshape(20, 3)[:, :2].flatten()
    assert measure(outputs, target, "f1_score") == pytest.approx(metrics.f1_score(kept, best, average="macro"))
    truth = YES.float()
    truth[::2] = math.nan
    assert measure(MIXED, truth, "recall") == pytest.approx(metrics.recall_score(YES[1::2], MIXED[1::2] > 0))
    assert math.isnan(measure(SCORES, torch.full((60,), -100), "f1_score"))


@pytest.mark.parametrize(
    ("outputs", "target", "name", "expected"),
    [
        (SCORES, LABELS.float(), "f1_score", "expected labels, whole numbers from 0 to 3, got torch.float32"),
        (MIXED[:, None], YES[:, None, None], "recall", r"expected outputs and target of one shape"),
        (ANSWERS[:, :1], NUMBERS[:, 0], "r2_score", r"expected outputs and target of one shape.*\[60, 1\] and \[60\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    tmp_path: Path, outputs: Tensor, target: Tensor, name: str, expected: str
) -> None:
    job, folder = load_job(write_project(tmp_path, train={"epochs": 1, "metrics": [name]}))
    project = project_of(job, folder)
    with pytest.raises(UserError, match=rf"train\.metrics: {name}.* failed: ValueError: {expected}"):
        call_metric(project.custom_metrics[0], outputs, target, project)


def test_a_metric_by_name_is_one_like_any_other_and_nobodys_own_code(tmp_path: Path) -> None:
    own = {"factory": "sklearn.metrics:r2_score", "better": "higher"}
    names = ["f1_score", "accuracy", own, "mean_absolute_percentage_error"]
    gates = {"f1_score": {"min": 0.5}, "mean_absolute_percentage_error": {"max": 9}}
    job, folder = load_job(write_project(tmp_path, train={"epochs": 1, "metrics": names}, gates=gates))
    assert job.metrics == ("accuracy",) and job.decisive_metric == "f1_score"
    assert [metric.name for metric in project_of(job, folder).custom_metrics] == [
        "f1_score", "r2_score", "mean_absolute_percentage_error",
    ]  # fmt: skip
    assert (job.direction("f1_score"), job.direction("mean_absolute_percentage_error")) == ("higher", "lower")
    assert user_modules(job, folder) == ["plain"]
    with pytest.raises(JobError, match="something that is measured: "):
        load_job(write_project(tmp_path, train={"epochs": 1}, gates={"f1_score": {"min": 0.5}}))


def test_a_missing_library_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interpreter, "has", lambda self, name: False)
    with pytest.raises(JobError, match=r"f1_score needs torchmetrics, .*pip install 'torchmetrics>=1\.6,<2'"):
        check(write_project(tmp_path, train={"epochs": 1, "metrics": ["f1_score"]}))

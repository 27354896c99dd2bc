"""What the gates measured, held against the epoch that ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from torchworker.contract import TrainResult, ValidateResult
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.agreement import agreements, require_agreement, require_may_pass, served_otherwise
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return load_job(write_project(tmp_path))[0]


def trained(samples: int = 20_000, **metrics: float) -> TrainResult:
    row = {"epoch": 3, "validation_loss": 0.1, **{f"validation_{name}": value for name, value in metrics.items()}}
    return TrainResult(
        weights="w", history=[{"epoch": 2, "validation_accuracy": 0.1}, row], train_samples=1,
        validation_samples=samples, data_fingerprint="", environment={}, notes=[],
    )  # fmt: skip


def gated(samples: int, metrics: dict[str, dict[str, float]], **errors: dict[str, float]) -> ValidateResult:
    return ValidateResult(
        verdicts=[], metrics=metrics, reference="", validation_samples=samples, standard_errors=errors
    )


def test_the_first_class_alone_at_the_gates_contradicts_the_epoch(job: Job) -> None:
    result = gated(10_000, {"onnx": {"accuracy": 1.0}}, onnx={"accuracy": 0.0})
    with pytest.raises(GateError, match=r"accuracy is 0\.5 at the end of epoch 3 on 20,000 .* 1 on 10,000 of these"):
        require_agreement(job, trained(accuracy=0.5), result)


def test_a_sample_may_differ_as_a_sample_does_and_no_more(job: Job) -> None:
    for value, agrees in ((0.905, True), (0.88, True), (0.86, False)):
        result = gated(1000, {"onnx": {"accuracy": value}}, onnx={"accuracy": 0.0025})
        (item,) = agreements(job, trained(accuracy=0.9), result)
        assert item.agrees is agrees, item


def test_of_the_same_samples_both_are_one_number_up_to_rounding(job: Job) -> None:
    for value, agrees in ((0.9003, True), (0.85, False)):
        result = gated(20_000, {"onnx": {"accuracy": value}})
        assert [item.agrees for item in agreements(job, trained(accuracy=0.9), result)] == [agrees]


def test_a_metric_on_a_scale_of_its_own_is_held_by_its_size(job: Job) -> None:
    for value, agrees in ((1.204e6, True), (1.3e6, False)):
        result = gated(20_000, {"onnx": {"mean_squared_error": value}})
        assert [item.agrees for item in agreements(job, trained(mean_squared_error=1.2e6), result)] == [agrees]


def test_the_epoch_that_was_chosen_is_the_one_that_is_held_against_the_gates(job: Job) -> None:
    chosen = replace(trained(accuracy=0.9), shipped_epoch=1, chosen_by="validation_accuracy")
    (item,) = agreements(job, chosen, gated(20_000, {"onnx": {"accuracy": 0.1}}))
    assert item.agrees and item.trained == 0.1


def test_what_cannot_be_compared_is_not(job: Job) -> None:
    # Of a sample without an error, of a metric that training has not, of int8, which has limits of its own.
    metrics = {"onnx": {"auc": 0.1, "other": 0.3}, "onnx-int8-static": {"accuracy": 0.1}}
    assert agreements(job, trained(auc=0.9, accuracy=0.9), gated(100, metrics)) == []


def test_a_custom_loop_reports_what_it_likes(tmp_path: Path) -> None:
    train: dict[str, Any] = {"entrypoint": "plain:main", "processes": 1}
    own = load_job(write_project(tmp_path, train=train))[0]
    assert agreements(own, trained(accuracy=0.9), gated(20_000, {"onnx": {"accuracy": 0.1}})) == []


def test_coupled_samples_have_other_answers_in_training_than_one_by_one(tmp_path: Path) -> None:
    coupled = load_job(write_project(tmp_path, parity={"coupled": "allowed"}))[0]
    assert agreements(coupled, trained(accuracy=1.0), gated(20_000, {"onnx": {"accuracy": 0.55}})) == []


SERVES = {"export": {"serving": "around:serve"}}


def test_a_metric_of_what_serves_may_differ_from_the_models_and_is_told(job: Job, tmp_path: Path) -> None:
    served = load_job(write_project(tmp_path / "served", **SERVES))[0]
    skewed = gated(100, {"onnx": {"accuracy": 0.1}})
    require_agreement(served, trained(100, accuracy=0.9), skewed)
    assert served_otherwise(served, trained(100, accuracy=0.9), skewed).startswith(
        "accuracy is 0.9 of the trained model and 0.1 of what around:serve makes of it (onnx); if this is not meant"
    )
    assert served_otherwise(served, trained(100, accuracy=0.1), skewed) == ""
    with pytest.raises(GateError):
        require_agreement(job, trained(100, accuracy=0.9), skewed)
    assert served_otherwise(job, trained(100, accuracy=0.9), skewed) == ""


def test_a_limit_is_asked_of_what_serves_and_not_of_the_model(tmp_path: Path) -> None:
    gates = {"gates": {"accuracy": {"min": 0.95}}}
    require_may_pass(load_job(write_project(tmp_path, **SERVES, **gates))[0], trained(100, accuracy=0.5))
    with pytest.raises(GateError, match=r"accuracy 0\.5, expected >= 0\.95"):
        require_may_pass(load_job(write_project(tmp_path, **gates))[0], trained(100, accuracy=0.5))

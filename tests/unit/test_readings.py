"""Processes of one run that have read different data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from torchworker.contract import ExportResult, InspectResult, Reading, RereadResult, SplitFacts, TrainResult
from train_and_ship.registry.data.readings import (
    Contradiction,
    contradictions_of_gates,
    contradictions_of_training,
    refusal,
)
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job


def job_of(folder: Path, **train: Any) -> Job:
    plan = {"epochs": 1, "processes": 2, "batch_size": 32, **train}
    return load_job(write_project(folder, train=plan))[0]


def facts(samples: int = 100, varies: bool = False, drawn: list[int] | None = None) -> InspectResult:
    split = SplitFacts(
        samples=samples, fingerprint="a" * 32, tensors={}, columns={}, labels={}, repeated=0, varies=varies
    )
    return InspectResult(train=split, validation=split, overlap=0, seconds=0.0, drawn=drawn)


def trained(**read: Reading) -> TrainResult:
    return TrainResult(
        weights="w", history=[], train_samples=100, validation_samples=100, data_fingerprint="a" * 32, environment={},
        notes=[], read=read,
    )  # fmt: skip


def exported(read: Reading) -> ExportResult:
    return ExportResult(
        artifacts={}, left_out={}, libraries=[], inputs=[], outputs=[], dims=[], reference="", validation=read
    )


SAME, OTHER = Reading(samples=100, fingerprint="a" * 32), Reading(samples=100, fingerprint="b" * 32)
FEWER = Reading(samples=50, fingerprint="c" * 32)


def test_the_same_samples_are_no_contradiction_and_a_result_of_before_says_nothing(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert contradictions_of_training(job, facts(), trained(train=SAME, validation=SAME)) == []
    assert contradictions_of_training(job, facts(), trained()) == []
    assert contradictions_of_gates(job, facts(), exported(SAME)) == []
    # As many as the first version took.
    assert contradictions_of_gates(job, facts(20_000), exported(SAME)) == []


def test_other_samples_and_other_counts_are(tmp_path: Path) -> None:
    found = contradictions_of_training(job_of(tmp_path), facts(), trained(train=OTHER, validation=FEWER))
    assert [(item.split, item.counted) for item in found] == [("train", False), ("validation", True)]


def test_random_augmentation_is_compared_only_where_each_sample_has_its_own_seed(tmp_path: Path) -> None:
    drawn_anew = facts(varies=True)
    read = trained(train=OTHER, validation=OTHER)
    assert contradictions_of_training(job_of(tmp_path / "a"), drawn_anew, read) == []
    seeded = contradictions_of_training(job_of(tmp_path / "b", data_workers=2), drawn_anew, read)
    assert [item.split for item in seeded] == ["train"]
    # How many they are does not depend on chance.
    fewer = contradictions_of_training(job_of(tmp_path / "c"), drawn_anew, trained(train=FEWER))
    assert [item.counted for item in fewer] == [True]


def test_of_drawn_samples_the_gates_count_is_asked(tmp_path: Path) -> None:
    some, job = facts(drawn=list(range(50))), job_of(tmp_path)
    assert contradictions_of_gates(job, some, exported(FEWER)) == []
    (wrong,) = contradictions_of_gates(job, some, exported(SAME))
    assert (wrong.inspected.samples, wrong.other.samples) == (50, 100)


def test_a_refusal_says_both_where_each_is_from_and_what_to_do(tmp_path: Path) -> None:
    found = Contradiction(split="train", inspected=SAME, other=OTHER, who="training")
    again = RereadResult(same=True, read=SAME)
    said = str(refusal(job_of(tmp_path / "a", data_workers=4), found, again))
    assert "fingerprint aaaaaaaa in inspection and bbbbbbbb in training" in said
    assert "read again by one process, twice alike, it is as in inspection" in said
    assert "train.data_workers: 4" in said and "open it where a sample is read" in said
    counted = replace(found, split="validation", other=FEWER)
    said = str(refusal(job_of(tmp_path / "b"), counted, None))
    assert "100 in inspection, 50 in training" in said and "divides itself among the ranks" in said


@pytest.mark.parametrize(("again", "like"), [(OTHER, "training"), (FEWER, "neither")])
def test_a_refusal_says_which_of_them_the_data_is_like(tmp_path: Path, again: Reading, like: str) -> None:
    found = Contradiction(split="train", inspected=SAME, other=OTHER, who="training")
    assert f"it is as in {like}" in str(refusal(job_of(tmp_path), found, RereadResult(same=True, read=again)))

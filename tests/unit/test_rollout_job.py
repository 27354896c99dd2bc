"""`release.rollout` of a job file: what it says, and what is a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.projects import write_project
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.rollouts.moves import Plan


def rollout_of(folder: Path, text: str) -> Plan:
    job = write_project(folder, name="digits")
    job.write_text(job.read_text() + f"\nrelease: {{rollout: {text}}}\n")
    found = load_job(job)[0].release.rollout
    assert found is not None
    return Plan.of(found)


def test_what_is_left_out_is_one_five_twenty_five_and_all_each_for_ten_minutes(tmp_path: Path) -> None:
    assert rollout_of(tmp_path, "{}") == Plan(steps=(100, 500, 2500, 10_000), every=600, max_hours=24, key="user_id")


def test_percentages_are_kept_in_hundredths_and_times_in_seconds(tmp_path: Path) -> None:
    text = (
        "{steps: [0.29, 33.33, 100], every: 2h, key: patient, max_hours: 48, fallback_ms: 250, shadow: true, "
        "stop_if: {errors: +0.5%, accuracy: -0.01}}"
    )
    assert rollout_of(tmp_path, text) == Plan(
        steps=(29, 3333, 10_000), every=7200, max_hours=48, key="patient", fallback_ms=250, shadow=True,
        stop_if={"errors": "+0.5%", "accuracy": -0.01},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{steps: [5, 1, 100]}", "release.rollout.steps: expected percentages that rise, and 1 follows 5"),
        ("{steps: [5, 5, 100]}", "percentages that rise, and 5 follows 5"),
        ("{steps: [1, 120]}", "percentages above 0 and up to 100, of which 120 is none"),
        ("{steps: [0, 100]}", "of which 0 is none"),
        ("{steps: [.nan, 100]}", "of which nan is none"),
        ("{steps: [1, 5]}", "100 as the last percentage, after which the release goes live, and it is 5"),
        ("{steps: []}", "1 to 100 percentages"),
        ("{steps: [0.001, 100]}", "in hundredths at the finest, such as 0.05, of which 0.001 is none"),
        ("{steps: 5}", "release.rollout.steps: expected a list"),
        ("{every: 10 minutes}", "every: expected a number and one of s, m, h, d, such as 10m"),
        ("{every: 600}", "every with its unit, such as 600s or 600m"),
        ("{every: 0s}", "a number and one of s, m, h, d"),
        ("{every: 7h}", "max_hours of at least 28.07 with 4 steps of 7h"),
        ("{max_hours: 0}", "greater than 0"),
        ("{key: ''}", "the name of what requests are split by"),
        ("{fallback_ms: -1}", "greater than or equal to 0"),
        ("{stop_if: {errors: [1]}}", "release.rollout.stop_if"),
        ("{stop_if: {errors: 1%}}", "release.rollout.stop_if: expected +0.5% (half a point more than live)"),
        ("{stop_if: {f1_score: -0.01}}", "f1_score is of all requests at once"),
        ("{stop_if: {errors: +1%, by: age}}", "a column that observe.columns keeps (it keeps none), not age"),
        ("{step: [1, 100]}", "unknown key; did you mean steps?"),
    ],
    ids=str,
)
def test_mistakes_are_told_with_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(JobError) as refused:
        rollout_of(tmp_path, text)
    assert said in str(refused.value)


def test_requests_are_told_apart_by_a_column_that_servers_keep(tmp_path: Path) -> None:
    job = write_project(tmp_path, name="digits")
    job.write_text(
        job.read_text() + "\nobserve: {columns: {inputs: [age]}}\n"
        "release: {rollout: {stop_if: {errors: +1%, by: age}}}\n"
    )
    found = load_job(job)[0]
    assert found.release.rollout is not None and found.release.rollout.by == "age"
    with pytest.raises(ValueError, match=r"keeps \(age\), not country"):
        found.require_kept("country")

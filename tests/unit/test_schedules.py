"""When a deployed job is asked: as it says itself, else as the deployment that it is made like."""

from __future__ import annotations

import pytest
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule

from train_and_ship.tasks.deployments import schedules_like

NIGHTLY = CronSchedule(cron="0 2 * * *", timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("wanted", "cron", "timezone"),
    [
        ((None, None), "0 2 * * *", "Europe/Berlin"),
        (("0 5 * * *", None), "0 5 * * *", "Europe/Berlin"),
        ((None, "UTC"), "0 2 * * *", "UTC"),
    ],
)
@pytest.mark.parametrize(("has_job", "active"), [(True, False), (True, True), (False, False)])
def test_what_a_job_does_not_say_is_as_in_the_pattern(
    wanted: tuple[str | None, str | None], cron: str, timezone: str, has_job: bool, active: bool
) -> None:
    pattern = [DeploymentSchedule(slug="nightly", schedule=NIGHTLY, active=active)]
    (made,) = schedules_like(pattern, has_job, *wanted)
    assert isinstance(made.schedule, CronSchedule)
    assert (made.slug, made.schedule.cron, made.schedule.timezone) == ("nightly", cron, timezone)
    # Switched off by a person it stays off; a pattern without a job is off because it has nothing to do.
    assert made.active == (active or not has_job)


def test_a_pattern_without_a_schedule_leaves_the_jobs_own() -> None:
    (made,) = schedules_like([], True, "0 5 * * *", None)
    # Prefect takes no time zone for UTC.
    assert made.active and made.schedule == CronSchedule(cron="0 5 * * *", timezone=None)
    assert schedules_like([], True, None, None) == []

"""Times of day that there are not, by Prefect's own scheduler."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import pytest
from prefect.client.schemas.schedules import CronSchedule

from train_and_ship.tasks.clock_changes import skipped_times

NOVEMBER = datetime(2026, 11, 29, tzinfo=UTC)


def said(cron: str, timezone: str | None) -> list[str]:
    return [str(skipped) for skipped in skipped_times(CronSchedule(cron=cron, timezone=timezone), NOVEMBER)]


@pytest.mark.parametrize(
    ("cron", "timezone", "missing"),
    [
        ("30 2 * * *", "Europe/Berlin", "2027-03-28 has no 02:30 in Europe/Berlin (clocks go from 02:00 to 03:00)"),
        (
            "15 2 * * *",
            "Australia/Lord_Howe",
            "2027-10-03 has no 02:15 in Australia/Lord_Howe (clocks go from 02:00 to",
        ),
        ("0 0 * * *", "America/Havana", "2027-03-14 has no 00:00 in America/Havana (clocks go from 00:00 to 01:00)"),
        ("*/20 * * * *", "Europe/Berlin", "2027-03-28 has no 02:00 in Europe/Berlin"),
    ],
)
def test_a_time_that_is_left_out_when_clocks_are_put_forward_is_said(cron: str, timezone: str, missing: str) -> None:
    (found,) = said(cron, timezone)
    assert found.startswith(missing)


@pytest.mark.parametrize(
    ("cron", "timezone"),
    [
        ("30 3 * * *", "Europe/Berlin"),
        ("30 2 * * 1", "Europe/Berlin"),
        ("30 2 1 1 *", "Europe/Berlin"),
        ("30 2 * * *", "UTC"),
        ("30 2 * * *", "Asia/Tokyo"),
        ("30 2 * * *", None),
    ],
)
def test_nothing_is_said_of_a_time_that_there_always_is(cron: str, timezone: str | None) -> None:
    assert said(cron, timezone) == []


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Prefect's scheduler has another way there")
def test_prefect_starts_what_falls_into_the_gap_before_it_also_on_the_day_before() -> None:
    assert said("30 2 * * *", "Europe/Berlin")[0].endswith("; Prefect starts it at 2027-03-28 01:30")
    assert said("30 0 * * *", "Africa/Cairo")[0].endswith("; Prefect starts it at 2027-04-29 23:30")
    assert said("*/20 * * * *", "Europe/Berlin")[0].endswith("; Prefect leaves it out")

"""Days on which clocks are put forward: what Prefect does with a time of day that there is not.

Asked of Prefect's own scheduler, whose answer depends on its version, and on that of Python where the server runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from prefect.client.schemas.schedules import CronSchedule

DAYS = 366
STEP = timedelta(minutes=15)
"""Clocks change at multiples of it."""
AROUND = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class SkippedTime:
    """A time of day that a schedule names, on a day on which there is none."""

    time: datetime
    """As the schedule has it, without a zone."""
    timezone: str
    begins: datetime
    """When the clocks are put forward: local time before."""
    ends: datetime
    """The same moment after."""
    instead: tuple[datetime, ...]
    """When Prefect starts runs around then that the schedule does not name; local time."""

    def __str__(self) -> str:
        said = " and ".join(f"at {run:%Y-%m-%d %H:%M}" for run in self.instead)
        return (
            f"{self.time:%Y-%m-%d} has no {self.time:%H:%M} in {self.timezone} (clocks go from {self.begins:%H:%M} to "
            f"{self.ends:%H:%M}); Prefect {f'starts it {said}' if said else 'leaves it out'}"
        )


def skipped_times(schedule: CronSchedule, after: datetime) -> list[SkippedTime]:
    """The first time that a schedule names and there is not, of each change of clocks in the year after a moment.

    Args:
        schedule: in a zone; UTC when it has none.
        after: with a zone.
    """
    if schedule.timezone is None:
        return []
    zone = ZoneInfo(schedule.timezone)
    found = []
    for begins, ends in _gaps(zone, after):
        # As if there were no zones.
        wall = begins.replace(tzinfo=UTC)
        named = [date.replace(tzinfo=None) for date in _dates(schedule, "UTC", wall - AROUND, wall + AROUND)]
        missing = [date for date in named if begins <= date < ends]
        if not missing:
            continue
        moment = begins.replace(tzinfo=zone)
        runs = _dates(schedule, schedule.timezone, moment - AROUND / 2, moment + AROUND / 2)
        odd = {run.astimezone(zone).replace(tzinfo=None) for run in runs} - set(named)
        found.append(
            SkippedTime(
                time=missing[0],
                timezone=schedule.timezone,
                begins=begins,
                ends=ends,
                instead=tuple(sorted(odd)),
            )
        )
    return found


def _gaps(zone: ZoneInfo, after: datetime) -> list[tuple[datetime, datetime]]:
    """Local time before and after each moment at which clocks are put forward."""
    found = []
    moment = after.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    for _ in range(DAYS * 24 * 4):
        before, now = ((moment + step).astimezone(zone).utcoffset() for step in (timedelta(0), STEP))
        if before is not None and now is not None and now > before:
            change = (moment + STEP).replace(tzinfo=None)
            found.append((change + before, change + now))
        moment += STEP
    return found


def _dates(schedule: CronSchedule, timezone: str, start: datetime, end: datetime) -> list[datetime]:
    # The client's schedule knows no dates.
    from prefect.server.schemas.schedules import CronSchedule as Scheduler

    scheduler = Scheduler(cron=schedule.cron, timezone=timezone, day_or=schedule.day_or)
    return list(asyncio.run(scheduler.get_dates(start=start, end=end)))

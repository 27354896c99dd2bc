"""One Prefect deployment a job file, made like the one of prefect.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.tasks.clock_changes import SkippedTime, skipped_times
from train_and_ship.tasks.pools import Pool

PATTERN = "retrain/retrain"
"""The deployment that the others are made like."""


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """When a deployment is run."""

    schedule: str
    """In words; empty without one."""
    skipped: Sequence[SkippedTime]
    """What becomes of it when clocks are put forward, in the year to come."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a deployment runs, and when."""

    job: str
    """What the flow takes as `job`: a project in the bucket, or a file of this machine."""
    channel: str
    cron: str | None
    """As crontab has it; None as in prefect.yaml."""
    timezone: str | None
    """Its name; None as in prefect.yaml."""


def deploy_jobs(wanted: Mapping[str, Wanted], pool: Pool | None = None) -> dict[str, Scheduled]:
    """Make or replace one deployment for each model. Writes to Prefect; can be repeated.

    No deployment says a folder of this machine, besides the job that it may name: the flows are in the package.

    Args:
        wanted: by model.
        pool: where runs are started; None for the pool of the deployment that they are made like.

    Returns:
        Name of each, as in `prefect deployment run <name>`, to when it is run.

    Raises:
        SettingsError: Prefect does not understand the schedule.
        ServiceError: the pattern is not there.
    """
    made = {}
    with get_client(sync_client=True) as client:
        try:
            pattern = client.read_deployment_by_name(PATTERN)
        except ObjectNotFound:
            raise ServiceError(
                f"Prefect: expected the deployment {PATTERN}, which the others are made like, and found none; "
                "`ship up` or `prefect deploy --all` makes it"
            ) from None
        now = datetime.now(UTC)
        made_for: dict[tuple[str | None, str | None], tuple[list[DeploymentScheduleCreate], Scheduled]] = {}
        for when in dict.fromkeys((one.cron, one.timezone) for one in wanted.values()):
            schedules = schedules_like(pattern.schedules, "job" in pattern.parameters, *when)
            crons = [item.schedule for item in schedules if isinstance(item.schedule, CronSchedule)]
            scheduled = Scheduled(
                schedule=", ".join(_in_words(item) for item in schedules),
                skipped=[skipped for schedule in crons for skipped in skipped_times(schedule, now)],
            )
            made_for[when] = (schedules, scheduled)
        for model, one in wanted.items():
            schedules, scheduled = made_for[one.cron, one.timezone]
            client.create_deployment(
                flow_id=pattern.flow_id,
                name=model,
                description=f"Train {model} again if anything changed, and put live what is better.",
                entrypoint=pattern.entrypoint,
                parameter_openapi_schema=pattern.parameter_openapi_schema,
                enforce_parameter_schema=pattern.enforce_parameter_schema,
                parameters={**pattern.parameters, "job": one.job},
                work_pool_name=pool.name if pool is not None else pattern.work_pool_name,
                job_variables=dict(pool.variables) if pool is not None else {},
                concurrency_limit=1,
                tags=[model, f"model:{model}", f"channel:{one.channel}"],
                schedules=schedules,
            )
            made[f"retrain/{model}"] = scheduled
    return made


def require_schedule(cron: str | None, timezone: str | None, where: str = "") -> CronSchedule:
    """The schedule. Raises SettingsError for one that Prefect does not understand.

    Args:
        cron: as crontab has it; None for every midnight.
        timezone: name of a time zone; None for UTC.
        where: begin of the message.
    """
    try:
        return CronSchedule(cron="0 0 * * *" if cron is None else cron, timezone=timezone)
    except ValidationError as error:
        got = " ".join(text for text in (cron, timezone) if text)
        raise SettingsError(
            f"{where}schedule {got!r}: expected what crontab takes, such as '0 2 * * *' for two o'clock each day, and "
            "a time zone such as Europe/Berlin (UTC when absent); "
            + error.errors()[0]["msg"].removeprefix("Value error, ")
        ) from None


def schedules_like(
    pattern: Sequence[DeploymentSchedule], has_job: bool, cron: str | None, timezone: str | None
) -> list[DeploymentScheduleCreate]:
    """The schedules of the pattern, with what is not None instead.

    Args:
        pattern: its own; where there is none, one is made if it is given.
        has_job: whether the pattern has one: outside of a clone it has not, and its schedule is off for that reason.
        cron: as crontab has it.
        timezone: name of a time zone.
    """

    def with_changes(schedule: SCHEDULE_TYPES | None) -> SCHEDULE_TYPES:
        if schedule is not None and cron is None and timezone is None:
            return schedule
        known = schedule if isinstance(schedule, CronSchedule) else None
        return require_schedule(
            cron or (known.cron if known else None), timezone or (known.timezone if known else None)
        )

    if not pattern and (cron or timezone):
        return [DeploymentScheduleCreate(slug="nightly", schedule=with_changes(None), active=True)]
    return [
        DeploymentScheduleCreate(
            slug=item.slug, schedule=with_changes(item.schedule), active=item.active or not has_job
        )
        for item in pattern
    ]


def _in_words(schedule: DeploymentScheduleCreate) -> str:
    if isinstance(schedule.schedule, CronSchedule):
        return f"{schedule.schedule.cron} {schedule.schedule.timezone or 'UTC'}"
    return type(schedule.schedule).__name__

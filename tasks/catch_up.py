"""Runs of a schedule that no worker took when they were due: one of them catches up for all.

While no worker is there, Prefect keeps the runs of a schedule that are due, and gives them out afterwards in no order
that one could rely on, beside those of today. Each would ask the same question, of the same code and data.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.states import Cancelled

from train_and_ship.tasks.away import is_away

FULL_MOMENT = "%Y-%m-%d %H:%M UTC"


async def catch_up(resume: str = "") -> list[str]:
    """For a run that a schedule made: cancel the others of its schedule that are due and have not begun.

    Runs that a person or an event started stay, and those with other parameters. A run that goes on, or is tried again,
    cancels nothing.

    Args:
        resume: id of an earlier run that this one goes on with; empty for a new one.

    Returns:
        Ids of the cancelled runs.
    """
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    own = context.flow_run
    if not own.auto_scheduled or own.deployment_id is None or resume or own.run_count > 1:
        return []
    missed = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[own.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    cancelled = []
    try:
        async with get_client() as client:
            for run in await client.read_flow_runs(flow_run_filter=missed):
                if run.id == own.id or not run.auto_scheduled or run.parameters != own.parameters:
                    continue
                state: State[Any] = Cancelled(
                    message=f"nobody worked at {_due(run)}; {own.name} ({own.id}) catches up for it"
                )
                result = await client.set_flow_run_state(run.id, state)
                if result.state is not None and result.state.is_cancelled():
                    cancelled.append(run)
    except Exception as error:
        # Then each of them runs, and finds nothing new.
        if not is_away(error):
            raise
    if cancelled:
        when = ", ".join(sorted(_due(run) for run in cancelled))
        get_run_logger().warning("nobody worked at %s; this run catches up for them, and they are cancelled", when)
    return [str(run.id) for run in cancelled]


def _due(run: FlowRun) -> str:
    return f"{run.expected_start_time:{FULL_MOMENT}}" if run.expected_start_time else "its time"

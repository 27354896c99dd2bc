"""What a flow run is called in Prefect, and how it ends there: by its model, and by what became of its candidate."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from train_and_ship.infra.errors import GateError, ShipError
from train_and_ship.registry.channels.channel import PRODUCTION
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.tasks.job_file import read_job_file
from train_and_ship.tasks.policy import quiet_mistakes

__all__ = ["GateError", "refused", "rolling_out", "run_name", "tag_run", "went_live"]

_DRAWN = re.compile(r"[a-z]+(-[a-z]+){1,2}")
"""Names that Prefect draws; any other was chosen by somebody."""


def run_name() -> str:
    """`digits 2026-11-28 22:55`: the model, and when the run began in UTC. A name that somebody chose stays.

    So does the name of a run whose job file cannot be read.
    """
    # Prefect asks for the name before it says anything of the run.
    quiet_mistakes()
    given, asked = str(flow_run.get_name()), flow_run.get_parameters()
    if not _DRAWN.fullmatch(given):
        return given
    try:
        model = asked["model"] if "model" in asked else read_job_file(asked["job"], str(flow_run.get_id())).job.name
    except ShipError:
        return given
    return f"{model} {datetime.now(UTC):%Y-%m-%d %H:%M}"


async def tag_run(client: PrefectClient, model: str, channel: str) -> None:
    """Tag this flow run `model:<name>` and `channel:<name>`, beside the tags that it has."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    tags = {*context.flow_run.tags, f"model:{model}", f"channel:{channel}"}
    await client.update_flow_run(context.flow_run.id, tags=sorted(tags))


def went_live(result: Any, title: str, channel: str, instead: str = "") -> State[Any]:
    """Completed, under the name Promoted, or Staged on a channel that is not `prod`.

    Args:
        result: of the flow.
        title: the message.
        channel: where it went.
        instead: the name, where it did not go live: Rolling out, or Staged while it waits for another rollout.
    """
    return Completed(name=instead or ("Promoted" if channel == PRODUCTION else "Staged"), message=title, data=result)


def rolling_out(rollout: Rollout) -> State[Rollout]:
    """Completed, under the name Rolling out."""
    return Completed(name="Rolling out", message=f"{rollout.model} {rollout.channel}: {rollout}", data=rollout)


def refused(error: GateError) -> State[Any]:
    """Failed, under the name Refused, with what refused it as the message."""
    return Failed(name="Refused", message=error.message, data=error)

"""A person says yes or no in Prefect's UI before a channel moves."""

from __future__ import annotations

import dataclasses

from prefect import get_run_logger
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from pydantic import Field

from infra.errors import GateError
from registry.moves import Verified, described
from tasks.moves import Request

WAIT_SECONDS = 7 * 24 * 3600
"""How long a person may take."""
LOOK_SECONDS = 2


class Approval(RunInput):
    """The form that Prefect shows on the page of the paused run."""

    approve: bool = Field(False, description="Put it live.")
    by: str = Field(min_length=1, description="Your name, for the record.")
    comment: str = ""


async def approval(request: Request, verified: Verified) -> Verified:
    """Pause the flow run until somebody has answered; returns what was approved, with the answer for the record.

    What was approved replaces what was live when it was asked, and nothing else. Raises GateError when the answer is
    no.
    """
    target = verified.target
    get_run_logger().info(
        "waiting for approval: %s %s, release %s; now %s",
        target.model, target.channel, target.release, described(target.live),
    )  # fmt: skip
    question = (
        f"## {target.model}: release `{target.release}` to `{target.channel}`?\n\n"
        f"Now {described(target.live)}.\n\n{request.mover.by}: {request.mover.why}\n\n"
        f"`ship diff {target.model} {target.channel} {target.release[:8]}` shows what would change."
    )
    answer = await apause_flow_run(
        wait_for_input=Approval.with_initial_data(description=question),
        timeout=WAIT_SECONDS,
        poll_interval=LOOK_SECONDS,
    )
    said = f"by {answer.by}" + (f": {answer.comment}" if answer.comment else "")
    if not answer.approve:
        raise GateError(f"{target.model} {target.channel}: release {target.release} was not approved {said}")
    return dataclasses.replace(
        verified,
        target=dataclasses.replace(target, expects_live=True),
        verdicts={**verified.verdicts, "approved": said},
    )

"""Back to a release that was live before."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from train_and_ship.tasks.approval import approval
from train_and_ship.tasks.move_report import report_move
from train_and_ship.tasks.moves import ask, choose_earlier, move_back
from train_and_ship.tasks.naming import GateError, refused, run_name
from train_and_ship.tasks.outcome import report_failure
from train_and_ship.tasks.results import Moved
from train_and_ship.tasks.stopping import stoppable


@flow(
    name="rollback",
    flow_run_name=run_name,
    on_failure=[report_failure],
    on_crashed=[report_failure],
    on_cancellation=[report_failure],
)
async def rollback(model: str, why: str, channel: str = "prod", to: str = "", by: str = "") -> Moved | State[Moved]:
    """Put back what was live before, after reading every byte of it back.

    `to` names a release instead: an id, `prod~2`, `staging`, or `v7` in MLflow; then a person has to say yes where the
    channel requires it (`ship channel show`). `why` and `by` are for the record.
    """
    try:
        async with stoppable():
            request = await ask(model, channel, why, by)
            earlier = await choose_earlier(request, to)
            approved = await approval(request, earlier)
            moved = await move_back(request, approved)
            await report_move(request, approved, moved)
            return moved
    except GateError as error:
        return refused(error)

"""A release that is in the bucket already goes live on another channel."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow
from prefect.client.schemas.objects import State

from train_and_ship.tasks.approval import approval
from train_and_ship.tasks.move_report import report_move
from train_and_ship.tasks.moves import ask, choose_existing, move_forward, rehearse_existing, roll_out
from train_and_ship.tasks.naming import GateError, refused, rolling_out, run_name, went_live
from train_and_ship.tasks.outcome import report_failure
from train_and_ship.tasks.results import Moved, Started
from train_and_ship.tasks.stopping import stoppable


@flow(
    name="promote",
    flow_run_name=run_name,
    on_failure=[report_failure],
    on_crashed=[report_failure],
    on_cancellation=[report_failure],
)
async def promote(
    model: str,
    why: str,
    source: str = "staging",
    channel: str = "prod",
    approve: bool = False,
    gates: bool = True,
    again: bool = False,
    by: str = "",
    allow: Sequence[str] = (),
    load_unsigned: bool = False,
    rollout: bool = False,
) -> State[Moved] | State[Started]:
    """Put what is live on `source` live on `channel`, after it was tried: downloaded, loaded, run, and compared.

    `source` is a channel, or names a release: an id, `staging~1`, or `v7` in MLflow. With `approve`, or where the
    channel requires it (`ship channel show`), a person has to say yes on this run's page first. `gates` asks the
    release's own `vs_live`; `again` allows a release that a rollback has just left. `allow` says in what the release
    may be of another kind than what is live: signature, labels, formats, model, live_score, runtime. `load_unsigned`
    runs code of the release that nobody vouches for. With `rollout` it gets a growing share of the requests first, by
    the steps of its own job, and the run ends as Rolling out. `why` and `by` are for the record.
    """
    try:
        async with stoppable():
            request = await ask(model, channel, why, by, allow)
            candidate = await choose_existing(request, source)
            tried = await rehearse_existing(request, candidate, gates, load_unsigned)
            approved = await approval(request, tried, approve)
            if rollout:
                return rolling_out(await roll_out(request, approved, again, load_unsigned))
            moved = await move_forward(request, approved, gates, again, load_unsigned)
            await report_move(request, approved, moved)
            return went_live(moved, f"{model} release {moved.release} is live on {channel}", channel)
    except GateError as error:
        return refused(error)

"""Rollouts go on, go live or are given up."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from train_and_ship.tasks.catch_up import catch_up
from train_and_ship.tasks.watch import Watched, find_rollouts, look_at, rest_until_needed, watched


@flow(name="watch")
async def watch(model: str = "") -> State[Watched]:
    """Look at every rollout of the bucket, or of one model, and do what is due: the next step, the move, the end.

    Its schedule asks each minute while a rollout is running, and rests otherwise. A killed run is followed by the next.
    """
    await catch_up()
    found = await find_rollouts(model)
    seen = await look_at(found)
    await rest_until_needed(found, seen)
    return watched(seen)

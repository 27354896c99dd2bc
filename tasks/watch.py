"""The steps of the flow `watch`: which rollouts there are, what is due, and whether there is anything left to watch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_events import PROMOTED, ROLLOUT
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.channels.aliases import sync_after_move
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover
from train_and_ship.registry.rollouts.record import Outcome
from train_and_ship.registry.rollouts.watch import Seen, look, with_rollouts
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.policy import quiet_mistakes
from train_and_ship.tasks.stage import stage_task


@dataclass(frozen=True, kw_only=True)
class Found:
    """Channels with a rollout that is running, and where the services are."""

    settings: Settings
    store: ObjectStore
    model: str
    """The only one that is looked at; empty for all."""
    channels: Sequence[Channel]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one run has seen."""

    lines: Sequence[str]
    """What became of each rollout, in words."""
    problems: Sequence[str]
    """Why others could not be looked at; the next run tries again."""
    broken: Sequence[str]
    """Which can never be: people have to."""
    running: int
    """How many go on."""


@stage_task("find-rollouts", "find")
async def find_rollouts(model: str) -> Found:
    """Every channel, of one model or of all, whose rollout says that it is running. Reads the bucket."""
    quiet_mistakes()
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    found = await asyncio.to_thread(lambda: list(with_rollouts(store, model, settings.mlflow_url)))
    return Found(settings=settings, store=store, model=model, channels=found)


@stage_task("look", delays=())
async def look_at(found: Found) -> Watched:
    """Do what is due, one rollout after the other; one that cannot be looked at keeps no other from it."""
    log, run = get_run_logger(), str(flow_run.get_id() or "")
    lines, problems, broken, running = list[str](), list[str](), list[str](), 0
    for channel in found.channels:
        try:
            seen = await asyncio.to_thread(look, channel, Mover(by=who(), why="watched", flow_run=run))
        except ShipError as error:
            (problems if error.retryable else broken).append(f"{channel}: {error}")
            log.error("%s: the rollout was not looked at to its end: %s", channel, error)
            continue
        if seen is None:
            continue
        log.info("%s", seen)
        lines.append(str(seen))
        running += not seen.ended
        if seen.ended:
            await _notify(seen)
    return Watched(lines=lines, problems=problems, broken=broken, running=running)


async def _notify(seen: Seen) -> None:
    """People, and MLflow, of a rollout that has ended."""
    live = seen.after.outcome is Outcome.PROMOTED
    if live:
        for warning in await asyncio.to_thread(sync_after_move, seen.channel):
            get_run_logger().warning(warning)
    emit(PROMOTED if live else ROLLOUT, seen.channel.model, str(seen), f"{seen.after.moved_by}: {seen.after.reason}")


@stage_task("rest", delays=())
async def rest_until_needed(found: Found, seen: Watched) -> None:
    """Switch the schedule off where nothing is left to watch; whoever begins a rollout switches it on. Never fails.

    It looks once more afterwards: a rollout may have begun meanwhile.
    """
    if seen.running or seen.problems or found.model:
        return
    if problem := await asyncio.to_thread(watch_rollouts, found.settings, False):
        get_run_logger().warning(problem)
    try:
        left = {str(channel) for channel in await asyncio.to_thread(lambda: list(with_rollouts(found.store)))}
    except ShipError:
        # Unknown is not nothing.
        left = {"unknown"}
    if left - {str(channel) for channel in found.channels}:
        await asyncio.to_thread(watch_rollouts, found.settings)


def watched(seen: Watched) -> State[Watched]:
    """How the run ends: Watched, Resting where nothing is running, or Failed where one could not be looked at."""
    if seen.problems:
        return Failed(message="; ".join(seen.problems))
    name = "Watched" if seen.running else "Resting"
    said = [*seen.lines, *seen.broken]
    return Completed(name=name, message="; ".join(said) or "no rollout is running", data=seen)

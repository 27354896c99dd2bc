"""The steps of a rollback, and of promoting a release that is in the bucket already."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Sequence

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_events import PROMOTED, ROLLOUT
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.bucket.catalog import require_model
from train_and_ship.registry.channels.aliases import sync_after_move
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover, release_job, roll_back
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.targets import Verified, ask_promotion, ask_rollback, described
from train_and_ship.registry.job.rollout import Rollout as Steps
from train_and_ship.registry.kind import kinds_in, require_kinds
from train_and_ship.registry.rollouts.live_job import not_observed
from train_and_ship.registry.rollouts.moves import Plan, RunningError, settle_if_possible
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.existing import promote_tried, roll_out_tried, try_out
from train_and_ship.tasks.naming import tag_run
from train_and_ship.tasks.policy import quiet_mistakes
from train_and_ship.tasks.results import Moved, Request
from train_and_ship.tasks.stage import stage_task
from train_and_ship.tasks.stopping import unless_stopped


@stage_task("ask", delays=())
async def ask(model: str, channel: str, why: str, by: str, allow: Sequence[str] = ()) -> Request:
    """Check that the model is there and that a reason is given.

    Args:
        model: its name in the bucket.
        channel: the channel that is to move.
        why: the reason, for the record.
        by: who asks; the worker's account when empty.
        allow: in which kinds (KINDS) a promotion may differ from what is live.
    """
    quiet_mistakes()
    require_kinds(allow)
    mover = Mover(by=by or who(), why=why, flow_run=str(flow_run.get_id() or ""))
    settings = Settings.load()
    asked = Channel(ObjectStore.from_settings(settings), model, channel, settings.mlflow_url)
    await asyncio.to_thread(require_model, asked.store, model)
    async with get_client() as client:
        await tag_run(client, model, channel)
    return Request(channel=asked, mover=mover, settings=settings, allow=tuple(allow))


@stage_task("choose-rollback", "choose")
async def choose_earlier(request: Request, to: str) -> Verified:
    """What was live before, or the release that `to` names; every byte of it is read back."""
    return await asyncio.to_thread(ask_rollback, request.channel, to, request.settings.public_key)


@stage_task("choose-promotion", "choose")
async def choose_existing(request: Request, source: str) -> Verified:
    """The release that `source` names, complete by what the bucket says of it; `rehearse_existing` reads the files."""
    return await asyncio.to_thread(ask_promotion, request.channel, source, request.settings.public_key)


@stage_task("rehearse-existing", "rehearse")
async def rehearse_existing(request: Request, verified: Verified, gates: bool, load_unsigned: bool = False) -> Verified:
    """Download it, load what may be in a clean process, run the golden inputs, and score it beside what is live.

    Args:
        request: who asks for what.
        verified: the target.
        gates: as in `move_forward`.
        load_unsigned: load also formats that carry code and that nobody vouches for.
    """
    tried = await try_out(request.settings, verified, gates=gates, load_unsigned=load_unsigned)
    get_run_logger().info("rehearsed from the bucket: %s", tried.verdicts["rehearsal"])
    for name in ("not loaded", "loaded unsigned"):
        if name in tried.verdicts:
            get_run_logger().warning("%s: %s", name, tried.verdicts[name])
    return tried


@stage_task("move-back", "move")
async def move_back(request: Request, verified: Verified) -> Moved:
    """Move the channel, once, atomically, and let MLflow's aliases follow."""
    pointer = await unless_stopped(functools.partial(roll_back, verified, request.mover))
    return await _notify(request, pointer)


@stage_task("move-forward", "move")
async def move_forward(
    request: Request, verified: Verified, gates: bool, again: bool, load_unsigned: bool = False
) -> Moved:
    """As `move_back`, unless it is of another kind than what is live by then, or worse by its own gates: GateError.

    Args:
        request: who asks for what.
        verified: the target, tried.
        gates: False leaves the job's `vs_live` out, which the record says.
        again: also a release that a rollback has just left.
        load_unsigned: as in `rehearse_existing`.
    """
    pointer = await promote_tried(
        request.settings, verified, request.mover, gates=gates, again=again, allow=request.allow,
        load_unsigned=load_unsigned, move=unless_stopped,
    )  # fmt: skip
    return await _notify(request, pointer)


@stage_task("roll-out", "start")
async def roll_out(request: Request, verified: Verified, again: bool, load_unsigned: bool = False) -> Rollout:
    """Begin a rollout in place of the move, with the steps that the release's own job says, or the usual ones.

    Args:
        request: who asks for what.
        verified: the target, tried and perhaps approved.
        again: as in `move_forward`; also one whose rollout was given up.
        load_unsigned: as in `rehearse_existing`.
    """
    job = await asyncio.to_thread(release_job, verified.target, verified.manifest)
    try:
        rollout = await roll_out_tried(
            request.settings, verified, request.mover, Plan.of(job.release.rollout or Steps()),
            again=again, allow=request.allow, load_unsigned=load_unsigned,
        )  # fmt: skip
    except RunningError as error:
        # This run's own, before it was tried again.
        if (error.rollout.release, error.rollout.flow_run) != (verified.target.release, request.mover.flow_run):
            raise
        rollout = error.rollout
    emit(ROLLOUT, rollout.model, f"{request.channel}: {rollout} has begun", f"{request.mover.by}: {request.mover.why}")
    if missing := await asyncio.to_thread(not_observed, request.channel, rollout):
        get_run_logger().warning(missing)
    if problem := await asyncio.to_thread(watch_rollouts, request.settings):
        get_run_logger().warning(problem)
    # As of `_notify`.
    return dataclasses.replace(rollout, etag="")


async def _notify(request: Request, pointer: Pointer) -> Moved:
    log = get_run_logger()
    title = f"{request.channel}: {described(pointer)}"
    log.info(title)
    differs = [f"{what}: {said}" for what, said in kinds_in(pointer.verdicts).items()]
    emit(PROMOTED, pointer.model, title, "\n".join([f"{request.mover.by}: {request.mover.why}", *differs]))
    for warning in await asyncio.to_thread(sync_after_move, request.channel):
        log.warning(warning)
    for said in await asyncio.to_thread(settle_if_possible, request.channel, pointer.moved_by):
        if said:
            log.warning(said)
    # Results hold no ETag: it belongs to the moment it was read.
    return dataclasses.replace(pointer, etag="")

"""Stage: the channel's pointer moves to the release, once, atomically; or its rollout beside what is live begins."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace

from prefect import get_run_logger

from train_and_ship.infra.errors import GateError
from train_and_ship.infra.provenance import who
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.bucket.signing import require_signer
from train_and_ship.registry.channels.aliases import set_challenger, sync_after_move
from train_and_ship.registry.channels.moves import (
    OtherLiveError,
    allowances,
    require_not_rolled_back,
    require_not_stale,
)
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.rules import require_approved
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.report.description import in_short
from train_and_ship.registry.rollouts.live_job import not_observed
from train_and_ship.registry.rollouts.moves import Plan, RunningError, settle_if_possible, start
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.registry.verdicts import passed_words, together_in_words
from train_and_ship.tasks.rehearse import hold_against
from train_and_ship.tasks.results import (
    Answer,
    Concluded,
    Kept,
    Promoted,
    Registered,
    Rehearsed,
    RollingOut,
    Run,
    Waiting,
)
from train_and_ship.tasks.stage import stage_task
from train_and_ship.tasks.stopping import require_not_stopped, unless_stopped


@stage_task("promote")
async def promote(run: Run, registered: Registered, rehearsed: Rehearsed, answer: Answer | None) -> Concluded:
    """Move the pointer, then let the MLflow alias follow it; every step can be repeated.

    The version of a refused candidate stays in MLflow as the challenger. MLflow decides nothing here: when it does not
    answer, the release is live all the same and the alias follows later.

    Where the job says `release.rollout` and something is live, a rollout begins in place of the move: all that is asked
    before a move is asked then. While another one is running the candidate waits.

    Args:
        run: the run that made the candidate.
        registered: the candidate's release and version.
        rehearsed: how it did, and beside which release.
        answer: what a person said; None when nobody was asked.

    Raises:
        GateError: what is live by then is of another kind, which nobody has allowed, is better than the job's `vs_live`
            and `release.policy` allow or comes from a run that began later, a rollback has just taken this very release
            off, or a person said no.
    """
    with run.timed("promote"):
        return await _promote(run, registered, rehearsed, answer)


@stage_task("promote", "promote if better")
async def promote_if_better(
    run: Run, registered: Registered, rehearsed: Rehearsed, answer: Answer | None
) -> Concluded | Kept:
    """As `promote`; a candidate that is not good enough is an answer, not a failure.

    Args:
        run: as in `promote`, as are the others.
        registered: the candidate.
        rehearsed: how it did.
        answer: what a person said.
    """
    with run.timed("promote"):
        try:
            return await _promote(run, registered, rehearsed, answer)
        except GateError as refusal:
            get_run_logger().warning("%s", refusal)
            return Kept(why=refusal.message, rehearsed=rehearsed)


async def _promote(run: Run, registered: Registered, rehearsed: Rehearsed, answer: Answer | None) -> Concluded:
    channel = run.channel
    log = get_run_logger()
    try:
        if answer is not None and not answer.approved:
            raise GateError(f"{channel}: release {registered.manifest.release} was not approved {answer.said}")
        moved, rehearsed = await _move(run, registered, rehearsed, answer)
    except GateError:
        await _challenges(run, registered)
        raise
    except RunningError as error:
        await _challenges(run, registered)
        log.warning("release %s waits: %s", registered.manifest.release, error)
        return Waiting(why=str(error), rehearsed=rehearsed)
    if isinstance(moved, Rollout):
        await _challenges(run, registered)
        if problem := await asyncio.to_thread(watch_rollouts, run.settings):
            log.warning("%s; `ship rollout %s --to %s --next` goes on", problem, channel.model, channel.name)
        if missing := await asyncio.to_thread(not_observed, channel, moved):
            log.warning(missing)
        log.info("%s: %s, beside release %s", channel, moved, rehearsed.live)
        return RollingOut(rollout=moved, rehearsed=rehearsed)
    for said in await asyncio.to_thread(settle_if_possible, channel, moved.moved_by):
        if said:
            log.warning(said)
    for warning in await asyncio.to_thread(sync_after_move, channel):
        log.warning(warning)
    log.info(
        "%s is live on %s: generation %d, release %s, %s bytes sent",
        channel.model, channel.name, moved.generation, moved.release, f"{rehearsed.published.sent_bytes:,}",
    )  # fmt: skip
    return Promoted(pointer=moved, rehearsed=rehearsed)


async def _challenges(run: Run, registered: Registered) -> None:
    """MLflow names the candidate, which is not live."""
    for warning in await asyncio.to_thread(set_challenger, run.channel, registered.version.version):
        get_run_logger().warning(warning)


async def _move(
    run: Run, registered: Registered, rehearsed: Rehearsed, answer: Answer | None
) -> tuple[Pointer | Rollout, Rehearsed]:
    """Move the pointer, or begin the rollout; when another release went live meanwhile, rehearse beside that one first.

    What a person approved replaces what was live when it was asked, and nothing else: GateError.
    """
    while True:
        rehearsed = await _require_same_kind(run, rehearsed, answer)
        rehearsed.require_good_enough()
        try:
            move = functools.partial(_move_from, run, registered, rehearsed, answer)
            return await unless_stopped(move), rehearsed
        except OtherLiveError as other:
            if answer is not None:
                now = other.live.release if other.live else "nothing"
                raise GateError(
                    f"{run.channel}: release {registered.manifest.release} was approved "
                    f"{answer.said}, to replace {rehearsed.live or 'nothing'}, but {now} is live by now; "
                    f"`ship run … --resume {run.folder.name}` compares and asks again"
                ) from None
            rehearsed = await hold_against(run, registered, rehearsed.published, other.live)


async def _require_same_kind(run: Run, rehearsed: Rehearsed, answer: Answer | None) -> Rehearsed:
    """With how each difference in kind is allowed: a person who said yes was asked about all of them. GateError."""
    allowed = rehearsed.allowed
    if answer is not None:
        allowed = {**dict.fromkeys({change.kind for change in rehearsed.changes}, answer.said), **allowed}
    told = (run.channel, rehearsed.published.release, rehearsed.live, rehearsed.changes, allowed)
    return replace(rehearsed, allowed=await asyncio.to_thread(allowances, *told))


def _move_from(run: Run, registered: Registered, rehearsed: Rehearsed, answer: Answer | None) -> Pointer | Rollout:
    """Move the pointer, or begin the rollout, beside what it was held against. OtherLiveError: another is live."""

    def replacing(live: Pointer | None) -> dict[str, str]:
        require_not_stopped()
        require_not_rolled_back(registered.manifest.release, live)
        require_not_stale(run.channel, registered.manifest.release, live, run.begun)
        if (live.release if live else "") != rehearsed.live:
            raise OtherLiveError(live)
        # Also where somebody has said so since this run looked.
        asks = f"`ship run … --resume {run.folder.name}` asks a person"
        required = require_approved(run.channel, answer.said if answer is not None else "", asks)
        return {**required, **(answer.in_words() if answer is not None else {})}

    signed = require_signer(run.store, registered.manifest, run.settings.public_key)
    move = Move(
        manifest=registered.manifest,
        reason=passed_words(registered.validated.result.verdicts),
        moved_by=who(),
        flow_run=run.flow_run_id,
        mlflow_version=registered.version.version,
        verdicts={
            **in_short(registered.validated.result.verdicts),
            **rehearsed.in_words(),
            **together_in_words(rehearsed.result),
            **signed,
        },
        etags=rehearsed.published.etags,
    )
    steps = run.job.release.rollout
    # The first release has nothing to be tried beside. One that is live is: a run that goes on finds it so.
    if steps is None or rehearsed.live in ("", registered.manifest.release):
        return move_channel(run.channel, move, accept=None, replacing=replacing)
    try:
        return start(run.channel, move, Plan.of(steps), replacing=replacing)
    except RunningError as error:
        if error.rollout.release == registered.manifest.release:
            return error.rollout
        raise

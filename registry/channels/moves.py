"""Rollback, and promotion of a release that is in the bucket already: what has to hold before a channel moves to one.

All raise RequestError for what cannot be asked for, ReleaseError for a release that is damaged, and the errors of
`move_channel`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import read_small_file, told_document
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import last_move
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer
from train_and_ship.registry.channels.rules import not_asked, require_approved
from train_and_ship.registry.channels.swap import Accept, Move, Replacing, move_channel
from train_and_ship.registry.channels.targets import Target, Verified, described
from train_and_ship.registry.identity import moment
from train_and_ship.registry.release.manifest import JOB, LINEAGE, Manifest

if TYPE_CHECKING:
    from train_and_ship.registry.job.job import Job
    from train_and_ship.registry.kind import KindChange

CLOCKS_DIFFER = timedelta(minutes=10)
"""By how much the clocks of the machines that train may be ahead of the store's."""
BY_JOB, BY_REQUEST = "by release.allow", "once, with --allow"
"""How a difference in kind is allowed, as the record of the move says it."""


class Flow(StrEnum):
    """Deployments that move a channel to a release that is in the bucket already."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"


class OtherLiveError(Exception):
    """What is live is not what the target was measured beside: measure again."""

    def __init__(self, live: Pointer | None) -> None:
        super().__init__("another release went live")
        self.live = live


@dataclass(frozen=True, kw_only=True)
class Mover:
    """Who asks for a move, and why."""

    by: str
    why: str
    flow_run: str = ""

    def __post_init__(self) -> None:
        if not self.why.strip():
            raise RequestError('why: expected a reason for the record, such as --why "errors since 14:00", got nothing')


def roll_back(verified: Verified, mover: Mover) -> Pointer:
    """Move the channel to the target. No gate is asked, and what is live may be broken.

    Raises:
        RequestError: the target expects what was live, and something else went live meanwhile.
        GateError: somebody named the target, the channel's rules require that a person is asked, and nobody was.
    """
    move = replace(_move_of(verified, mover), kind=ROLLBACK)
    target = verified.target

    def replacing(live: Pointer | None) -> Mapping[str, str]:
        _require_unchanged(target, live)
        return (
            not_asked(target.channel) if target.was_before else require_asked(target, verified.approved, Flow.ROLLBACK)
        )

    return move_channel(target.channel, move, accept=None, replacing=replacing)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A move to an existing release, and what is asked before it: as `move_channel` takes them."""

    move: Move
    accept: Accept | None
    replacing: Replacing


def promote_existing(
    verified: Verified, mover: Mover, *, gates: bool = True, again: bool = False, allow: Sequence[str] = ()
) -> Pointer:
    """Move the channel to the target, unless it is of another kind than what is live then, or worse.

    Args:
        verified: the target, read and perhaps tried.
        mover: who moves it, and why.
        gates: False leaves its own job's `vs_live` out, which the record says.
        again: also a release that a rollback has just left.
        allow: in which kinds (KINDS) it may differ, beside those that its own job allows.

    Raises:
        GateError: it is worse, differs in kind in a way that nobody has allowed, or the channel's rules require that a
            person is asked, and nobody was.
        OtherLiveError: the target was measured beside a release that is not live.
    """
    asked = promotion_of(verified, mover, gates=gates, again=again, allow=allow)
    return move_channel(verified.target.channel, asked.move, accept=asked.accept, replacing=asked.replacing)


def promotion_of(
    verified: Verified, mover: Mover, *, gates: bool = True, again: bool = False, allow: Sequence[str] = ()
) -> Promotion:
    """What `promote_existing` moves, and what it asks: a rollout asks it before its first step. Moves nothing.

    Args:
        verified: as of `promote_existing`, as are the others.
        mover: who moves it.
        gates: whether `vs_live` is asked.
        again: whether a rollback of it matters.
        allow: kinds.
    """
    target = verified.target
    job = release_job(target, verified.manifest) if gates else None

    def accept(live: Pointer | None, manifest: Manifest | None) -> Mapping[str, str]:
        if job is None or live is None or manifest is None:
            return {"vs_live": "not asked" if job is None else "nothing was live"}
        return _require_not_worse(job, verified, live, manifest)

    def replacing(live: Pointer | None) -> Mapping[str, str]:
        _require_unchanged(target, live)
        if not again:
            require_not_rolled_back(target.release, live)
        if gates and verified.scored is not None and verified.scored.live != (live.release if live else ""):
            raise OtherLiveError(live)
        asked = require_asked(target, verified.approved, Flow.PROMOTE)
        return {**asked, **_require_same_kind(verified, live, allow)}

    move = _move_of(verified, mover)
    if not gates:
        move = replace(move, verdicts={**move.verdicts, "vs_live": "not asked"})
    return Promotion(move=move, accept=accept if gates else None, replacing=replacing)


def require_asked(target: Target, approved: str, flow: Flow) -> dict[str, str]:
    """What the channel's rules require of a move, for its record. Reads the bucket.

    Args:
        target: what is to go live.
        approved: who is said to have said yes; empty when nobody was asked.
        flow: which one asks a person, for the message.

    Raises:
        GateError: somebody has to be asked, and nobody was; with the command that asks.
    """
    named = {Flow.PROMOTE: "source", Flow.ROLLBACK: "to"}[flow]
    model, channel = target.channel.model, target.channel.name
    words = {"model": model, "channel": channel, named: target.release}
    given = " ".join(f"-p {name}={said}" for name, said in words.items())
    asks = f'`prefect deployment run {flow} {given} -p why="…"` asks a person'
    return require_approved(target.channel, approved, asks)


def require_not_rolled_back(release: str, live: Pointer | None) -> None:
    """Raises GateError when what is live is there because a rollback left `release`."""
    if live is not None and live.kind == ROLLBACK and live.previous == release:
        raise GateError(
            f"{live.model} {live.channel}: release {release} was taken off by a rollback "
            f"({on_one_line(live.moved_by)}, {live.moved_at}: {on_one_line(live.reason)}) and does not go live again "
            "by itself; "
            f"`ship promote {live.model} --from {release[:8]} --to {live.channel} --again --why …` puts it back"
        )


def require_not_stale(channel: Channel, release: str, live: Pointer | None, begun: str) -> None:
    """Raises GateError when what is live comes from a run that was begun later than the one that made `release`.

    What is live and does not say when it was begun, or is broken, keeps nobody out.

    Args:
        channel: what is to move.
        release: id of the release that would go live.
        live: what is live.
        begun: UTC, ISO 8601, by the clock of the machine that ran it, as `lineage.json` of a release has it.
    """
    from train_and_ship.registry.diff import read_release_record

    if live is None or live.release == release:
        return
    try:
        record = read_release_record(channel.store, live.model, live.release, sha256=live.manifest_sha256)
        later = moment(record.document(LINEAGE).get("begun", ""))
        # A run begins before its release is moved. One that says otherwise would keep out every run to come.
        if later > channel.store.now() + CLOCKS_DIFFER:
            return
    except (ReleaseError, ValueError, TypeError):
        return
    if later > moment(begun):
        raise GateError(
            f"{live.model} {live.channel}: release {live.release} is live and comes from a run that began later "
            f"({later.isoformat()}) than this one ({begun}), which is not put in its place; a new run is held against "
            "it"
        )


def kind_changes(verified: Verified, live: Pointer | None) -> list[KindChange]:
    """What makes a target another kind of thing than what is live. Reads the records of both.

    What is live and whose manifest cannot be read differs in nothing: a way out of a broken release needs no consent.

    Raises ReleaseError for a target that says something of itself that nobody understands, also where nothing is live:
    the next one would be compared with nothing.
    """
    from train_and_ship.registry.diff import read_release_record
    from train_and_ship.registry.kind import changes_in_kind

    store, manifest = verified.target.channel.store, verified.manifest
    if live is not None and live.release == manifest.release:
        return []
    candidate = read_release_record(store, manifest.model, manifest.release, sha256=manifest.sha256())
    candidate.require_understood()
    if live is None:
        return []
    try:
        before = read_release_record(
            store, manifest.model, live.release, sha256=live.manifest_sha256, altered_are_left_out=True
        )
    except ReleaseError:
        return []
    return [*changes_in_kind(before.kind, candidate.kind), *(verified.scored.contradictions if verified.scored else ())]


def allowances(
    channel: Channel, release: str, live: str, changes: Sequence[KindChange], allowed: Mapping[str, str]
) -> Mapping[str, str]:
    """How each difference in kind is allowed, also by the channel's own past, which is read only where nothing else is.

    Args:
        channel: what is to move.
        release: id of the candidate.
        live: id of what is live.
        changes: what differs.
        allowed: kind to who allows it.

    Raises:
        GateError: nobody has allowed one, and the release was never live here.
    """
    from train_and_ship.registry.kind import not_allowed, refusal

    if not (asked := not_allowed(changes, allowed)):
        return allowed
    if last_move(channel, release) is None:
        raise refusal(channel.model, channel.name, release, live, changes, allowed)
    return {**allowed, **dict.fromkeys(asked, f"because it was live on {channel.name} before")}


def release_job(target: Target, manifest: Manifest) -> Job:
    """The job that made the target. Raises GateError when it cannot be read, for then its gates cannot be asked.

    manifest: of the target; the job is the one that it names by hash: in the job are the gates.
    """
    from pydantic import ValidationError

    from train_and_ship.registry.job.job import Job

    try:
        if JOB not in manifest.files:
            raise ReleaseError(f"{release_prefix(manifest.model, manifest.release)}{JOB}: expected the job, got none")
        return Job.from_record(told_document(read_small_file(target.channel.store, manifest, JOB)))
    except (ValidationError, ValueError, TypeError, RecursionError, ReleaseError) as error:
        raise GateError(
            f"the gates of release {target.release} cannot be evaluated: {error}. --no-gates promotes without them"
        ) from None


def _require_unchanged(target: Target, live: Pointer | None) -> None:
    if target.expects_live and live != target.live:
        raise RequestError(
            f"{target.channel}: not moved, because somebody else moved it meanwhile: {described(live)}. "
            "Look again, then ask again if you still want to"
        )


def _require_not_worse(job: Job, verified: Verified, live: Pointer, manifest: Manifest) -> Mapping[str, str]:
    """The target's own gates against what is live, by what was measured, or else by what both say of themselves.

    manifest: of the live release. Returns what was compared, for the record. Raises GateError.
    """
    from train_and_ship.registry.gates import VersusLive, require_good_enough

    gated = [metric for metric, gate in job.gates.items() if gate.vs_live is not None]
    scored = verified.scored
    if scored is not None and scored.samples:
        mine, theirs = scored.candidate, scored.against
        problem, how = scored.problem, f"both measured on {scored.samples:,} held-out samples"
    else:
        mine, theirs = verified.manifest.metrics, manifest.metrics
        problem, how = "", "as recorded when each was made"
    # Nobody drew samples anew here, so `release.policy` is not asked: a person is.
    versus = VersusLive(live=live.release, candidate=mine, theirs=theirs, problem=problem)
    require_good_enough(job, versus, policy=False)
    said = [f"{metric} {mine[metric]:.4g} against {theirs[metric]:.4g}" for metric in gated]
    # Times can only be compared when they are measured side by side, which train-and-ship does.
    timed = [name for name, gate in job.gates.items() if gate.times_live is not None]
    more = {"times_live": f"not measured: {', '.join(timed)}"} if timed else {}
    compared = f"{'; '.join(said)}, {how}" if said else "no such gate"
    return {"vs_live": f"{compared} (live {live.release})", **more}


def _require_same_kind(verified: Verified, live: Pointer | None, allow: Sequence[str]) -> Mapping[str, str]:
    """What differs in kind and how it is allowed, for the record. Raises GateError."""
    changes = kind_changes(verified, live)
    if not changes:
        return {}
    from train_and_ship.registry.kind import in_words

    assert live is not None, "what is live differs"
    target = verified.target
    allowed = dict.fromkeys({change.kind for change in changes}, verified.approved) if verified.approved else {}
    # A job that cannot be read allows nothing.
    with contextlib.suppress(GateError):
        allowed |= dict.fromkeys(release_job(target, verified.manifest).release.allow, BY_JOB)
    allowed |= dict.fromkeys(allow, BY_REQUEST)
    return in_words(changes, allowances(target.channel, target.release, live.release, changes, allowed))


def _move_of(verified: Verified, mover: Mover) -> Move:
    return Move(
        manifest=verified.manifest,
        # The record is read by everybody who may see the channel.
        reason=without_password(mover.why),
        moved_by=mover.by,
        flow_run=mover.flow_run,
        mlflow_version=verified.target.mlflow_version,
        verdicts=verified.verdicts,
    )

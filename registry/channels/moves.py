"""Rollback, and promotion of a release that is in the bucket already: both verify the target before they move.

All raise RequestError for what cannot be asked for, ReleaseError for a release that is damaged, and the errors of
`move_channel`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError, ShipError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import read_small_file, verify_release
from train_and_ship.registry.bucket.signing import require_signer
from train_and_ship.registry.channels.aliases import version_of
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record, last_move
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.registry.channels.rules import not_asked, require_approved
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.channels.timeline import rollback_target
from train_and_ship.registry.identity import moment, require_channel, require_new_channel
from train_and_ship.registry.release.manifest import JOB, LINEAGE, Manifest
from train_and_ship.registry.tracking.rest import model_registry

if TYPE_CHECKING:
    from train_and_ship.registry.job.job import Job
    from train_and_ship.registry.kind import KindChange

CLOCKS_DIFFER = timedelta(minutes=10)
"""By how much the clocks of the machines that train may be ahead of the store's."""


class Flow(StrEnum):
    """Deployments that move a channel to a release that is in the bucket already."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"


BY_JOB, BY_REQUEST = "by release.allow", "once, with --allow"
"""How a difference in kind is allowed, as the record of the move says it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A release that is to go live on a channel, and what was live when that was decided."""

    channel: Channel
    release: str
    mlflow_version: str
    """Empty when nobody could tell."""
    live: Pointer | None
    """What it is to replace."""
    expects_live: bool
    """Given up when something else is live by then: nobody named the release, or this very move was approved."""
    manifest_sha256: str = ""
    """Hexadecimal SHA-256 of its manifest, where a record says which it had when it was live; else empty. Files make
    the id, and what the manifest says of them is whoever's who may write releases."""
    was_before: bool = False
    """Whether it is what a rollback without a name goes back to: what was live before. Nobody is asked about that."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A target and what was live, measured by one process on the same held-out samples."""

    live: str
    """The release that was live; empty when nothing was."""
    samples: int
    """How many; 0 where the samples are not within reach, so that only recorded numbers can be compared."""
    candidate: Mapping[str, float]
    against: Mapping[str, float]
    """The live release's numbers."""
    problem: str
    """Why the live release could not be measured; empty when it was."""
    contradictions: Sequence[KindChange] = ()
    """Where the live release scored far below its own record."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A target whose bytes are what its manifest says."""

    target: Target
    manifest: Manifest
    verdicts: Mapping[str, str]
    scored: Scored | None = None
    """None when nobody has run it."""
    approved: str = ""
    """Who is said to have said yes, in words; empty when nobody was asked."""


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


def choose_rollback(channel: Channel, release: str | None, manifest_sha256: str = "") -> Target:
    """What a rollback goes back to: `release`, or what was live before this one. Reads only.

    manifest_sha256: of the release, where who named it knows; else what the channel's own history says of it counts.
    """
    live = _live(channel)
    if release is not None:
        target = _target(channel, release, live)
        return replace(target, manifest_sha256=manifest_sha256 or _described_then(channel, release))
    if live is None:
        raise RequestError(
            f"{channel.model}: nothing is live on {channel.name!r}, so there is nothing to go back from; use --to"
        )
    before = rollback_target(live, lambda generation: _record_of(channel, generation))
    if before is None:
        raise RequestError(
            f"{channel}: expected a release that was live before {live.release}, found none; name one with --to"
        )
    return Target(
        channel=channel,
        release=before.release,
        mlflow_version=before.mlflow_version,
        live=live,
        expects_live=True,
        manifest_sha256=before.manifest_sha256,
        was_before=True,
    )


def _live(channel: Channel) -> Pointer | None:
    require_channel(channel.name)
    live = read_pointer(channel)
    if live is None:
        require_new_channel(channel.name)
    return live


def choose_promotion(channel: Channel, release: str, manifest_sha256: str = "") -> Target:
    """An existing release for a channel. Reads only. manifest_sha256: as in `choose_rollback`."""
    return replace(_target(channel, release, _live(channel)), manifest_sha256=manifest_sha256)


def verify_target(target: Target, *, read_back: bool = True, public_key: Path | None = None) -> Verified:
    """Check every byte of the target, or with read_back=False what the store says of its files. Reads only.

    public_key: file (PEM) of the key that has to have signed it; None asks for no signature.
    """
    store = target.channel.store
    manifest = verify_release(
        store, target.channel.model, target.release, read_back=read_back, sha256=target.manifest_sha256 or None
    )
    how = "read back and hashed" if read_back else "checked by what the store says of them"
    said = f"{len(manifest.files)} files, {manifest.total_bytes:,} bytes, {how}"
    signed = require_signer(store, manifest, public_key)
    return Verified(target=target, manifest=manifest, verdicts={"bytes": said, **signed})


def ask_rollback(channel: Channel, to: str, public_key: Path | None, *, read_back: bool = True) -> Verified:
    """Resolve, choose and verify what a rollback goes back to. Reads only.

    Args:
        channel: what is to move.
        to: names a release, as `named_release` takes it; empty for what was live before.
        public_key: as in `verify_target`.
        read_back: as in `verify_target`.
    """
    named = named_release(channel, to) if to else None
    target = choose_rollback(channel, *((named.release, named.manifest_sha256) if named else (None,)))
    return verify_target(target, read_back=read_back, public_key=public_key)


def ask_promotion(channel: Channel, source: str, public_key: Path | None) -> Verified:
    """Resolve, choose and verify the release that `source` names, by what the store says of it. Reads only.

    Whoever tries it before it goes live reads its files. Arguments: as of `ask_rollback`.
    """
    named = named_release(channel, source)
    target = choose_promotion(channel, named.release, named.manifest_sha256)
    return verify_target(target, read_back=False, public_key=public_key)


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
    return move_channel(target.channel, move, accept=accept if gates else None, replacing=replacing)


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
    """
    from train_and_ship.registry.diff import read_release_record
    from train_and_ship.registry.kind import changes_in_kind

    store, manifest = verified.target.channel.store, verified.manifest
    if live is None or live.release == manifest.release:
        return []
    candidate = read_release_record(store, manifest.model, manifest.release, sha256=manifest.sha256())
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
        return Job.from_record(json.loads(read_small_file(target.channel.store, manifest, JOB)))
    except (ValidationError, ValueError, TypeError, RecursionError, ReleaseError) as error:
        raise GateError(
            f"the gates of release {target.release} cannot be evaluated: {error}. --no-gates promotes without them"
        ) from None


def described(live: Pointer | None) -> str:
    """One line on what is live: release, since when, by whom and why."""
    if live is None:
        return "nothing is live"
    who, why = on_one_line(live.moved_by), on_one_line(live.reason)
    since = f"generation {live.generation}, {live.moved_at}, {who}: {why}"
    return f"release {live.release} is live ({since})"


# ---- below


def _target(channel: Channel, release: str, live: Pointer | None) -> Target:
    if live is not None and live.release == release:
        raise RequestError(f"{channel}: {described(live)} already; nothing was moved")
    try:
        version = version_of(model_registry(channel.tracking_uri), channel.model, release, "") or ""
    except ShipError:
        # The record then names none, and the alias is found by the release, once MLflow is back.
        version = ""
    return Target(channel=channel, release=release, mlflow_version=version, live=live, expects_live=False)


def _described_then(channel: Channel, release: str) -> str:
    """Hash of the manifest that a release had when it was live here last; empty where no record tells."""
    move = last_move(channel, release)
    return move.manifest_sha256 if move is not None else ""


def _require_unchanged(target: Target, live: Pointer | None) -> None:
    if target.expects_live and live != target.live:
        raise RequestError(
            f"{target.channel}: not moved, because somebody else moved it meanwhile: {described(live)}. "
            "Look again, then ask again if you still want to"
        )


def _record_of(channel: Channel, generation: int) -> Pointer:
    move = find_record(channel, generation)
    if move is None:
        raise RequestError(
            f"{channel}: the record of generation {generation} is lost, so what was live before is not known; "
            f"name a release with --to, or try `ship doctor {channel.model}` first"
        )
    return move


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

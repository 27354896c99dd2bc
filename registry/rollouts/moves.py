"""A rollout from its start to its end: what has to hold before the first step, and what moves the channel at the last.

Every function that writes can be repeated, and killed anywhere: what is in the bucket says what is left to be done.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError, ShipError
from train_and_ship.infra.shown import on_one_line, whole
from train_and_ship.registry.bucket.releases import read_manifest, verify_release
from train_and_ship.registry.bucket.tombstones import claim
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record
from train_and_ship.registry.channels.moves import Mover, OtherLiveError, roll_back
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.channels.swap import Accept, Move, Replacing, asked, move_channel, shortened
from train_and_ship.registry.channels.targets import choose_rollback, verify_target
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.rollouts.record import Outcome, Rollout, State, percent, read_rollout
from train_and_ship.registry.rollouts.versions import change, read_versions

if TYPE_CHECKING:
    from train_and_ship.registry.job.rollout import Rollout as Asked

VERDICT = "rollout"
"""In the record of a move: the rollout that it ended, in words."""
LOOK_BACK = 50
"""Versions among which an ended rollout of the same candidate is looked for."""
_BAD_ENDS = (Outcome.ROLLED_BACK, Outcome.UNDECIDED, Outcome.REPLACED)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a candidate gets its share of the requests."""

    steps: tuple[int, ...]
    """Shares in hundredths of a percent, rising to all."""
    every: int
    """Seconds that each lasts at least."""
    max_hours: float
    """After which it ends undecided."""
    key: str
    """As of Rollout, as are the others."""
    fallback_ms: int = 0
    shadow: bool = False
    stop_if: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: Asked) -> Plan:
        """As a job file, or a command line, says it."""
        return cls(
            steps=asked.shares,
            every=asked.seconds,
            max_hours=asked.max_hours,
            key=asked.key,
            fallback_ms=asked.fallback_ms,
            shadow=asked.shadow,
            stop_if=asked.stop_if,
        )


class RunningError(RequestError):
    """A rollout of the channel is running already: `rollout`."""

    def __init__(self, rollout: Rollout) -> None:
        model, channel = rollout.model, rollout.channel
        super().__init__(
            f"{model} {channel}: a rollout is running already, of {rollout}, since {rollout.started_at} "
            f"({on_one_line(rollout.moved_by)}); `ship rollout {model} --to {channel} --stop --why …` ends it"
        )
        self.rollout = rollout


def start(
    channel: Channel,
    move: Move,
    plan: Plan,
    *,
    accept: Accept | None = None,
    replacing: Replacing | None = None,
    again: bool = False,
) -> Rollout:
    """Begin the rollout of a published release beside what is live. Writes.

    All that `move_channel` asks before a move is asked here, before the first step, and not again at the last one.

    Args:
        channel: where it is to go live in the end.
        move: the release, and what the record says of it.
        plan: its steps.
        accept: as of `move_channel`.
        replacing: as of `move_channel`.
        again: also a release whose last rollout was given up.

    Raises:
        RequestError: nothing is live, or the release is live already.
        RunningError: a rollout is running, perhaps of this very release.
        GateError: from what is asked; the release takes or gives other tensors than what is live; or a rollout of it
            ended before it was live.
        OtherLiveError: something else went live meanwhile.
        ReleaseError: the release is incomplete, or is not what its manifest says.
    """
    store, release, sha256 = channel.store, move.manifest.release, move.manifest.sha256()
    settle(channel, move.moved_by)
    require_startable(channel, move.manifest, again=again)
    # As before a move: nobody deletes it from here on, and it is complete.
    claim(store, channel.model, release, publishing=False)
    if verify_release(store, channel.model, release, etags=move.etags, read_back=False).sha256() != sha256:
        raise ReleaseError(
            f"release {release} of {channel.model}: the bucket has the same files with another description"
        )
    now = store.now()

    def make(there: Rollout | None) -> Rollout:
        live = _require_room(channel, release, there)
        found = asked(channel, live, accept, replacing)
        _require_same_signature(channel, move.manifest, live)
        return Rollout(
            model=channel.model,
            channel=channel.name,
            generation=live.generation,
            extends=live.nonce,
            release=release,
            manifest_sha256=sha256,
            rollout=uuid.uuid4().hex,
            steps=plan.steps,
            every=plan.every,
            deadline=(now + timedelta(hours=plan.max_hours)).isoformat(),
            key=plan.key,
            fallback_ms=plan.fallback_ms,
            shadow=plan.shadow,
            stop_if=dict(plan.stop_if),
            started_at=now.isoformat(),
            moved_at=now.isoformat(),
            moved_by=whole(move.moved_by),
            reason=whole(move.reason),
            why=whole(move.reason),
            flow_run=move.flow_run,
            mlflow_version=move.mlflow_version,
            verdicts=shortened({**move.verdicts, **found}),
        )

    started = change(channel, make)
    if not started.extends_pointer(live := read_pointer(channel)):
        settle(channel, move.moved_by)
        raise OtherLiveError(live)
    return started


def require_startable(channel: Channel, candidate: Manifest, *, again: bool = False) -> None:
    """What `start` asks before anything is tried, for whoever would otherwise try it in vain. Reads only.

    Args:
        channel: where it is to go live.
        candidate: the release.
        again: as of `start`.

    Raises as `start`.
    """
    live = _require_room(channel, candidate.release, read_rollout(channel))
    _require_same_signature(channel, candidate, live)
    if not again:
        require_not_given_up(channel, candidate.release)


def go_on(channel: Channel, rollout: Rollout, mover: Mover) -> Rollout:
    """From the step that was looked at to the next one; from the last one, the candidate goes live. Writes.

    Where another writer was faster, that is left as it is. Returns what is there then.

    Raises as `finish`.
    """
    if rollout.is_last_step:
        return finish(channel, rollout, mover)
    now = channel.store.now().isoformat()

    def make(there: Rollout | None) -> Rollout:
        if there is None:
            raise _gone(channel)
        if there.nonce != rollout.nonce:
            return there
        return replace(_by(mover, there, now), step=there.step + 1)

    return change(channel, make)


def finish(channel: Channel, rollout: Rollout, mover: Mover) -> Rollout:
    """Put the candidate live, with what was asked before the first step as the record, and end the rollout. Writes.

    Nothing moves when something else went live meanwhile, or the rollout was changed; where it was given up in the very
    moment of the move, the channel goes back. Returns what is there then.

    Raises:
        ReleaseError: the candidate is no longer what it was.
        ServiceError: it could not be done, or not be told: then call again.
    """
    manifest = read_manifest(channel.store, channel.model, rollout.release, sha256=rollout.manifest_sha256)

    def replacing(live: Pointer | None) -> None:
        # The last look before the pointer is written.
        now = read_rollout(channel)
        if now is None or now.nonce != rollout.nonce or not now.stands_under(live):
            raise _ChangedError

    move = Move(
        manifest=manifest,
        reason=rollout.why,
        moved_by=mover.by,
        flow_run=mover.flow_run,
        mlflow_version=rollout.mlflow_version,
        verdicts={**rollout.verdicts, VERDICT: _in_words(rollout)},
    )
    try:
        pointer = move_channel(channel, move, accept=None, replacing=replacing)
    except _ChangedError:
        return settle(channel, mover.by) or rollout
    ended = settle(channel, mover.by) or rollout
    mine = pointer.verdicts.get(VERDICT) == move.verdicts[VERDICT]
    if mine and ended.rollout == rollout.rollout and ended.outcome in (Outcome.ROLLED_BACK, Outcome.UNDECIDED):
        _go_back(channel, pointer, ended, mover)
    return ended


def stop(channel: Channel, rollout: Rollout, outcome: Outcome, mover: Mover) -> Rollout:
    """End a rollout: from the reader's next look on no request goes to the candidate. Writes; can be repeated.

    Args:
        channel: whose rollout it is.
        rollout: which; another one that follows it is left alone.
        outcome: what became of it.
        mover: who ends it, and why.

    Returns:
        How it ended, which is how it had ended before where that is so.
    """
    now = channel.store.now().isoformat()

    def make(there: Rollout | None) -> Rollout:
        if there is None:
            raise _gone(channel)
        if there.rollout != rollout.rollout or not there.is_running:
            return there
        return replace(_by(mover, there, now), state=State.ENDED, outcome=outcome)

    return change(channel, make)


def settle(channel: Channel, by: str) -> Rollout | None:
    """Where another pointer has ended a rollout, say so in it too. Writes; can be repeated.

    Returns the newest version, running or ended; None where there never was a rollout.
    """
    there = read_rollout(channel)
    if there is None or not there.is_running:
        return there
    live = read_pointer(channel)
    if there.extends_pointer(live):
        return there
    outcome, why = _outcome_under(channel, there, live)
    return stop(channel, there, outcome, Mover(by=by, why=why))


def settle_if_possible(channel: Channel, by: str) -> tuple[str, str]:
    """As `settle`, after a move, which has ended the rollout already: what was ended and what is in the way, in words.

    Either may be empty. Never raises.
    """
    try:
        before = read_rollout(channel)
        if before is None or not before.is_running:
            return "", ""
        after = settle(channel, by)
    except ShipError as error:
        return "", f"whether this move has ended a rollout is not written down; `ship doctor` does it: {error}"
    if after is None or after.is_running:
        return "", ""
    return f"the rollout of release {before.release} has ended: {after.outcome.value}", ""


def require_not_given_up(channel: Channel, release: str) -> None:
    """Raises GateError when a rollout of this release ended without it: it is not offered again by itself."""
    for version in read_versions(channel, LOOK_BACK):
        if version.release != release or version.is_running:
            continue
        if version.outcome in _BAD_ENDS:
            raise GateError(
                f"{channel}: the rollout of release {release} ended at {version.moved_at}: {version.outcome.value} "
                f"({on_one_line(version.moved_by)}: {on_one_line(version.reason)}), and it is not offered again by "
                f"itself; `ship rollout {channel.model} {release[:8]} --to {channel.name} --again --why …` rolls it "
                "out once more"
            )
        return


def went_live_though_given_up(rollout: Rollout, live: Pointer) -> bool:
    """Whether `finish` died between its move, in whose moment somebody ended the rollout, and the way back."""
    given_up = rollout.outcome in (Outcome.ROLLED_BACK, Outcome.UNDECIDED)
    followed = (live.generation, live.release) == (rollout.generation + 1, rollout.release)
    return given_up and followed and live.verdicts.get(VERDICT) == _in_words(rollout)


def running(channel: Channel) -> Rollout | None:
    """The rollout of which the candidate gets requests now; None where there is none. Reads only.

    Raises ReleaseError for an object that cannot be read.
    """
    there = read_rollout(channel)
    return there if there is not None and there.stands_under(read_pointer(channel)) else None


# ---- below


class _ChangedError(Exception):
    """The rollout, or what is live, is not what was looked at."""


def _require_room(channel: Channel, release: str, there: Rollout | None) -> Pointer:
    """What is live. there: the newest version of the channel's rollout. Raises as `start`."""
    live = read_pointer(channel)
    if live is None:
        raise RequestError(
            f"{channel}: nothing is live, so there is nothing that a release could be rolled out beside; `ship "
            f"promote {channel.model} --from {release[:8]} --to {channel.name} --why …` puts it live"
        )
    if there is not None and there.stands_under(live):
        raise RunningError(there)
    if live.release == release:
        raise RequestError(f"{channel}: release {release} is live already; nothing was started")
    return live


def _gone(channel: Channel) -> ReleaseError:
    return ReleaseError(f"{channel}: expected its rollout, got none: the object was deleted")


def _by(mover: Mover, rollout: Rollout, now: str) -> Rollout:
    """The next version, with who makes it, when and why."""
    said = whole(without_password(mover.why))
    return replace(rollout, moved_at=now, moved_by=whole(mover.by), reason=said, flow_run=mover.flow_run)


def _in_words(rollout: Rollout) -> str:
    """For the record of the move; the id tells it from a move of the same release by somebody else."""
    steps = ", ".join(map(percent, rollout.steps))
    return f"{steps} of the requests since {rollout.started_at}, by {rollout.key} (rollout {rollout.rollout})"


def _require_same_signature(channel: Channel, candidate: Manifest, live: Pointer) -> None:
    """Whoever asks does not know which of the two answers, so both take and give the same tensors."""
    before = read_manifest(channel.store, live.model, live.release, sha256=live.manifest_sha256).signature
    for name in ("inputs", "outputs", "dims"):
        # Of dims the order says nothing.
        one, two = ([*map(canonical_json, said.get(name, []))] for said in (before, candidate.signature))
        if (sorted(one) != sorted(two)) if name == "dims" else one != two:
            raise GateError(
                f"{channel}: release {candidate.release} has other {name} than release {live.release}, which is live, "
                "and in a rollout the same request may go to either; `ship promote "
                f"{channel.model} --from {candidate.release[:8]} --to {channel.name} --allow signature --why …` puts "
                "it live at once"
            )


def _outcome_under(channel: Channel, rollout: Rollout, live: Pointer | None) -> tuple[Outcome, str]:
    """What became of a rollout by the move that followed it, and that move in words."""
    if live is None:
        return Outcome.REPLACED, "nothing is live any more"
    move: Pointer | None = live
    if live.generation > rollout.generation + 1:
        try:
            move = find_record(channel, rollout.generation + 1)
        except ReleaseError:
            move = None
    if move is None or move.generation != rollout.generation + 1:
        return Outcome.REPLACED, f"release {live.release} is live, generation {live.generation}"
    said = f"generation {move.generation}, {on_one_line(move.moved_by)}: {on_one_line(move.reason)}"
    if move.release == rollout.release:
        return Outcome.PROMOTED, said
    return (Outcome.ROLLED_BACK if move.kind == ROLLBACK else Outcome.REPLACED), said


def _go_back(channel: Channel, mine: Pointer, ended: Rollout, mover: Mover) -> None:
    """The candidate went live in the moment in which somebody gave it up: it goes off again. Writes."""
    target = choose_rollback(channel, "")
    if target.live is None or target.live.nonce != mine.nonce:
        return
    why = f"its rollout was ended in the moment of this move ({ended.moved_by}: {ended.reason})"
    roll_back(verify_target(target, read_back=False), replace(mover, why=why))

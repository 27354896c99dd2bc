"""Channels: what is live, moved by one conditional PUT of the pointer.

Generation and nonce make every pointer unique, so an ETag is never met again, and a mover whose reply was lost
recognises its own move by the nonce.

Functions that write say so; the others only read. All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from shipreader.records import POINTER_BYTES
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError, StoreRefusedError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.shown import on_one_line, whole
from train_and_ship.infra.store_probe import advice
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import read_manifest, verify_release
from train_and_ship.registry.bucket.tombstones import SHORTEST_GRACE, boot_seconds, claim, is_gone
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import (
    first_generation,
    read_record,
    record_if_possible,
    record_key,
    record_unless_taken,
)
from train_and_ship.registry.channels.pointer import (
    PROMOTION,
    ROLLBACK,
    MoveKind,
    Pointer,
    decode_pointer,
    read_pointer,
)
from train_and_ship.registry.channels.timeline import utc_now
from train_and_ship.registry.release.manifest import Manifest

MOVE_CONFLICTS = 50
"""How often a mover may find that another was faster."""
MOVE_FAULTS = 5
"""How often in one move the store may not answer, or answer with a fault."""
LONGEST_PAUSE_SECONDS = 1.0
LONGEST_VERDICT = 10_000
"""Characters of a gate's name, and of what was found, in a record."""
CLAIM_FRESH_SECONDS = 60.0
"""A release that was claimed longer ago is claimed again before the move."""
CLAIM_HOLDS_SECONDS = SHORTEST_GRACE.total_seconds() / 2
"""Within this time after a claim no collector can have deleted the release; afterwards the mover looks again."""

Accept = Callable[[Pointer | None, Manifest | None], Mapping[str, str] | None]
"""Given what is live and its manifest, both None on an unused channel; raises GateError to keep it.

Returns verdicts for the record of the move: gate to what was found, in words.
"""
Replacing = Callable[[Pointer | None], Mapping[str, str] | None]
"""Given what is live, None on an unused channel; raises whatever is to keep it. Returns what `Accept` does."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """A release that is to go live, and what the record says of its move."""

    manifest: Manifest
    reason: str
    moved_by: str
    flow_run: str = ""
    """Id of the flow run that moves it; empty outside a flow."""
    mlflow_version: str = ""
    """Version of the model in MLflow; empty when it has none."""
    kind: MoveKind = PROMOTION
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """What was proven before, by gate, in words."""
    etags: Mapping[str, str] | None = None
    """Of its files, as `verify_release` takes them."""


class Outcome(Enum):
    """What came of one attempt to move a channel."""

    LIVE = auto()
    """The release is live: by this move, also when others followed it, or by an earlier one."""
    WRITTEN = auto()
    """The store acknowledged our pointer. A 200 is believed when it is seen: read it back at once."""
    CONFLICT = auto()
    """Another was faster, or it is ours and the reply was lost: reading tells."""
    FAULT = auto()
    """The store did not answer, or answered with a fault that may pass."""


def move_channel(channel: Channel, move: Move, *, accept: Accept | None, replacing: Replacing | None = None) -> Pointer:
    """Make a published release live on a channel, once, atomically. Writes; can be repeated.

    A channel that has this release already is left as it is.

    Args:
        channel: what moves.
        move: the release, and what the record says.
        accept: asked about what is live, and again whenever that has changed before our move. None asks nobody and
            reads nothing of the live release, which may be broken.
        replacing: asked likewise, and about the pointer only.

    Returns:
        The pointer that this call, or an earlier one, wrote. It was live, but another mover may have followed.

    Raises:
        ReleaseError: the release is incomplete, or is not what its manifest says.
        GateError: from `accept`.
        StoreRefusedError: the store has no conditional writes.
        ServiceError: it could not be done, or not be told, after several attempts: then call again.
    """
    mover = _Mover(channel, move, accept, replacing)
    mover.prepare()
    times: Counter[Outcome] = Counter()
    while (outcome := mover.attempt()) is not Outcome.LIVE:
        times[outcome] += 1
        if outcome is Outcome.CONFLICT and times[outcome] >= MOVE_CONFLICTS:
            raise mover.gives_up(times[outcome]) from mover.error
        if outcome is Outcome.FAULT and times[outcome] >= MOVE_FAULTS:
            raise mover.error
        if outcome is not Outcome.WRITTEN:
            pause(times[outcome])
    assert mover.live is not None
    return mover.live


def asked(
    channel: Channel, live: Pointer | None, accept: Accept | None, replacing: Replacing | None
) -> Mapping[str, str]:
    """What both say about what is live, for the record; whatever they raise keeps it.

    Args:
        channel: what is to move.
        live: what is live there.
        accept: as of `move_channel`.
        replacing: as of `move_channel`.
    """
    found = (replacing(live) if replacing is not None else None) or {}
    if accept is not None:
        found = {**found, **(accept(live, _live_manifest(channel, live)) or {})}
    return found


def pause(times: int) -> None:
    """Wait a random while, longer each time: racers that pause alike meet again."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.01 * 2**times)))


def shortened(verdicts: Mapping[str, str]) -> dict[str, str]:
    """As a record has them: some of it are words of a release, which may be anybody's."""
    return {on_one_line(name, LONGEST_VERDICT): on_one_line(said, LONGEST_VERDICT) for name, said in verdicts.items()}


# ---- below


class _Mover:
    """One move of a channel, from one attempt to the next."""

    def __init__(self, channel: Channel, move: Move, accept: Accept | None, replacing: Replacing | None) -> None:
        self._channel, self._move, self._accept, self._replacing = channel, move, accept, replacing
        self._release, self._sha256 = move.manifest.release, move.manifest.sha256()
        self._nonce = uuid.uuid4().hex
        self._claimed = 0.0
        """By the clock of `boot_seconds`."""
        self._tried: Pointer | None = None
        """What was sent last, whatever came of it."""
        self._acknowledged = False
        """The store says that it wrote it."""
        self._asked: str | None = None
        """The version of what is live that `accept` and `replacing` agreed to replace; None before they were asked."""
        self._found: Mapping[str, str] = {}
        """What they returned then."""
        self._replaced: Pointer | None = None
        """What was live when `_tried` was sent."""
        self._conflicted: Pointer | None = None
        """What was live at the last conflict."""
        self._conflicts_on_same = 0
        """Conflicts in a row during which it did not change."""
        self.live: Pointer | None = None
        """What was read last, and at the end what is returned."""
        self.error: PreconditionFailedError | ServiceError = ServiceError("not tried yet")
        """Why the last attempt did not move it."""

    def prepare(self) -> None:
        """Once, before the first attempt: nobody deletes the release from here on, and it is complete. Writes."""
        store, model = self._channel.store, self._channel.model
        store.probe_again()
        self._claim()
        # Without ETags its caller has just read it, or was told not to.
        stored = verify_release(store, model, self._release, etags=self._move.etags, read_back=False)
        if stored.sha256() != self._sha256:
            raise ReleaseError(
                f"release {self._release} of {model}: the bucket has the same files with another description"
            )

    def attempt(self) -> Outcome:
        """Read what is live; unless that settles it, record it, ask, and try to replace it. Writes."""
        try:
            self.live = live = read_pointer(self._channel)
            if self._tried is not None and (mine := _as_written(self._channel, self._tried, live)) is not None:
                self._finish(mine)
                return Outcome.LIVE
            if self._acknowledged:
                raise ReleaseError(
                    f"{self._channel}: the store acknowledged generation {self._tried.generation if self._tried else 0}"
                    f", but what is live is {live}: it does not keep what it promised"
                )
            if live is not None:
                # Before it is replaced: its own mover may have died.
                record_unless_taken(self._channel.store, live, probably_there=True)
                if (live.release, live.manifest_sha256) == (self._release, self._sha256):
                    return Outcome.LIVE
            self._ask(live)
            self._put(live)
            self._acknowledged = True
            return Outcome.WRITTEN
        except PreconditionFailedError as error:
            self.error = error
            before, self._conflicted = self._conflicted, self.live
            self._conflicts_on_same = self._conflicts_on_same + 1 if self.live == before else 1
            return Outcome.CONFLICT
        except ServiceError as error:
            if not error.retryable:
                raise
            self.error = error
            return Outcome.FAULT

    def gives_up(self, conflicts: int) -> ServiceError:
        """What to raise after so many conflicts in one move."""
        if self._conflicts_on_same < conflicts:
            return ServiceError(f"{self._channel}: not moved: others moved it {conflicts} times while this was tried")
        store = self._channel.store
        store.distrust()
        return StoreRefusedError(
            f"{self._channel}: not moved: {store.address} refused the conditional write of the pointer {conflicts} "
            f"times, while nobody moved it. {advice(store)}"
        )

    def _claim(self) -> None:
        claim(self._channel.store, self._channel.model, self._release, publishing=False)
        self._claimed = boot_seconds()

    def _ask(self, live: Pointer | None) -> None:
        """Once about each thing that is live."""
        version = live.nonce if live else ""
        if self._asked == version:
            return
        self._found = asked(self._channel, live, self._accept, self._replacing)
        self._asked = version

    def _put(self, live: Pointer | None) -> None:
        move = self._move
        self._tried = Pointer(
            model=self._channel.model,
            channel=self._channel.name,
            generation=live.generation + 1 if live else first_generation(self._channel),
            release=self._release,
            manifest_sha256=self._sha256,
            previous=live.release if live else None,
            nonce=self._nonce,
            moved_at=utc_now(),
            moved_by=whole(move.moved_by),
            reason=whole(move.reason),
            flow_run=move.flow_run,
            mlflow_version=move.mlflow_version,
            kind=move.kind,
            verdicts=shortened({**move.verdicts, **self._found}),
        )
        if boot_seconds() - self._claimed > CLAIM_FRESH_SECONDS:
            self._claim()
        self._replaced = live
        _put_pointer(self._channel.store, self._tried, live)

    def _finish(self, mine: Pointer) -> None:
        """Our move took place: record it, and move back if the release was deleted before. Writes."""
        record_if_possible(self._channel.store, mine)
        if boot_seconds() - self._claimed > CLAIM_HOLDS_SECONDS and self.live == mine:
            _require_not_deleted(self._channel, mine, self._replaced)
        self.live = mine


def _require_not_deleted(channel: Channel, mine: Pointer, replaced: Pointer | None) -> None:
    """For a mover that stood still between its claim and its move: move back if the release is gone. Writes.

    Raises ReleaseError in that case.
    """
    if not is_gone(channel.store, mine.model, mine.release):
        return
    outcome = "nothing was live before, so this channel has no usable release now"
    if replaced is not None:
        back = replace(
            replaced,
            generation=mine.generation + 1,
            previous=mine.release,
            nonce=uuid.uuid4().hex,
            moved_at=utc_now(),
            reason=f"release {mine.release} was deleted by `ship gc` while its mover stood still",
            kind=ROLLBACK,
            verdicts={},
        )
        outcome = f"the channel went back to {replaced.release}"
        try:
            record_unless_taken(channel.store, mine)
            _put_pointer(channel.store, back, mine)
        except PreconditionFailedError:
            outcome = "another mover has followed"
    raise ReleaseError(
        f"{channel}: release {mine.release} was deleted by `ship gc` while its mover stood still for "
        f"more than {CLAIM_HOLDS_SECONDS / 60:.0f} minutes; {outcome}"
    )


def _as_written(channel: Channel, tried: Pointer, live: Pointer | None) -> Pointer | None:
    """The pointer as our attempt wrote it, when it took place: still live, or in the history if others followed."""
    if live is None or live.generation < tried.generation:
        return None
    if live.nonce == tried.nonce:
        return live
    if live.generation == tried.generation:
        return None
    # Whoever replaced ours made sure first that it is there.
    recorded = read_record(channel.store, record_key(tried.model, tried.channel, tried.generation))
    return recorded if recorded.nonce == tried.nonce else None


def _put_pointer(store: ObjectStore, pointer: Pointer, live: Pointer | None) -> None:
    """Replace what is live, or create the first pointer. Raises PreconditionFailedError when something else is live,
    and ReleaseError for a record that no reader would take."""
    key, body = pointer_key(pointer.model, pointer.channel), pointer.encode()
    if len(body) > POINTER_BYTES:
        told = sum(len(text) for item in pointer.verdicts.items() for text in item)
        raise ReleaseError(
            f"{key}: expected a record of at most {POINTER_BYTES:,} bytes, got {len(body):,}: readers would refuse it; "
            f"the reason has {len(pointer.reason):,} characters, and {len(pointer.verdicts):,} verdicts have {told:,}: "
            "say why in fewer words, or ship with fewer gates"
        )
    decode_pointer(body, key)
    if live is None:
        store.put_new(key, body)
    else:
        store.replace(key, body, live.etag)


def _live_manifest(channel: Channel, live: Pointer | None) -> Manifest | None:
    if live is None:
        return None
    try:
        return read_manifest(channel.store, live.model, live.release, sha256=live.manifest_sha256)
    except ReleaseError as error:
        raise ReleaseError(
            f"the live release of {channel} is broken; no candidate can be held against it: {error}"
        ) from error

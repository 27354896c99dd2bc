"""Channels: what is live, moved by one conditional PUT of the pointer.

Generation and nonce make every pointer unique, so an ETag is never met again, and a mover whose reply was lost
recognises its own move by the nonce.

Functions that write say so; the others only read. All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from train_and_ship.infra.errors import PreconditionFailed, ReleaseError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import read_manifest, verify_release
from train_and_ship.registry.bucket.tombstones import SHORTEST_GRACE, State, boot_seconds, claim, read_tombstone
from train_and_ship.registry.channels.history import (
    first_generation,
    read_record,
    record,
    record_if_possible,
    record_key,
)
from train_and_ship.registry.channels.pointer import PROMOTION, ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.release.manifest import Manifest

MOVE_CONFLICTS = 50
"""How often a mover may find that another was faster."""
MOVE_FAULTS = 5
"""How often in one move the store may not answer, or answer with a fault."""
LONGEST_PAUSE_SECONDS = 1.0
CLAIM_FRESH_SECONDS = 60.0
"""A release that was claimed longer ago is claimed again before the move."""
CLAIM_HOLDS_SECONDS = SHORTEST_GRACE.total_seconds() / 2
"""Within this time after a claim no collector can have deleted the release; afterwards the mover looks again."""

Accept = Callable[[Pointer | None, Manifest | None], Mapping[str, str] | None]
"""Given what is live and its manifest, both None on an unused channel; raises GateError to keep it.

Returns verdicts for the record of the move: gate to what was found, in words.
"""


def read_live(store: ObjectStore, model: str, channel: str) -> tuple[Pointer | None, Manifest | None]:
    """What is live on a channel and its manifest; ReleaseError when its manifest is missing or altered."""
    pointer = read_pointer(store, model, channel)
    return pointer, _live_manifest(store, pointer)


def move_channel(
    store: ObjectStore,
    manifest: Manifest,
    *,
    model: str,
    channel: str,
    reason: str,
    moved_by: str,
    flow_run: str,
    mlflow_version: str,
    accept: Accept | None,
    etags: Mapping[str, str] | None = None,
    replacing: Callable[[Pointer | None], None] | None = None,
    kind: str = PROMOTION,
    verdicts: Mapping[str, str] | None = None,
) -> Pointer:
    """Make a published release live on a channel, once, atomically. Writes; can be repeated.

    `accept` is asked about what is live, and again whenever that has changed before our move; None asks nobody and
    reads nothing of the live release, which may be broken. `replacing` is asked likewise, and about the pointer only.
    A channel that has this release already is left as it is. etags: as in `verify_release`.

    Returns the pointer that this call, or an earlier one, wrote. It was live, but another mover may have followed.
    Raises ReleaseError when the release is incomplete or is not what `manifest` says, GateError from `accept`,
    StoreRefused for a store without conditional writes, and ServiceError when it could not be done, or not be told,
    after several attempts: then call again.
    """
    store.probe()
    release, manifest_sha256 = manifest.release, manifest.sha256()
    claim(store, model, release, publishing=False)
    claimed = boot_seconds()
    stored = verify_release(store, model, release, etags=etags)
    if stored.sha256() != manifest_sha256:
        raise ReleaseError(f"release {release} of {model}: the bucket has the same files with another description")
    nonce = uuid.uuid4().hex
    tried: Pointer | None = None
    replaced: Pointer | None = None
    accepted: str | None = None
    found: Mapping[str, str] = {}
    acknowledged = False
    conflicts = faults = 0
    while True:
        try:
            live = read_pointer(store, model, channel)
            if tried is not None and (mine := _outcome(store, tried, live)) is not None:
                record_if_possible(store, mine)
                if boot_seconds() - claimed > CLAIM_HOLDS_SECONDS and live == mine:
                    _require_not_deleted(store, mine, replaced)
                return mine
            if acknowledged:
                raise ReleaseError(
                    f"{model} {channel}: the store acknowledged generation {tried.generation if tried else 0}, "
                    f"but what is live is {live}: it does not keep what it promised"
                )
            if live is not None:
                # Before it is replaced: its own mover may have died.
                record(store, live, probably_there=True)
                if (live.release, live.manifest_sha256) == (release, manifest_sha256):
                    return live
            if accepted != _version(live):
                if replacing is not None:
                    replacing(live)
                if accept is not None:
                    found = accept(live, _live_manifest(store, live)) or {}
                accepted = _version(live)
            tried = Pointer(
                model=model,
                channel=channel,
                generation=live.generation + 1 if live else first_generation(store, model, channel),
                release=release,
                manifest_sha256=manifest_sha256,
                previous=live.release if live else None,
                nonce=nonce,
                moved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                moved_by=moved_by,
                reason=reason,
                flow_run=flow_run,
                mlflow_version=mlflow_version,
                kind=kind,
                verdicts={**(verdicts or {}), **found},
            )
            if boot_seconds() - claimed > CLAIM_FRESH_SECONDS:
                claim(store, model, release, publishing=False)
                claimed = boot_seconds()
            replaced = live
            _put_pointer(store, tried, live)
            # Read back at once: a 200 is believed when it is seen.
            acknowledged = True
        except PreconditionFailed as error:
            # Another was faster, or it is ours and the reply was lost: reading tells.
            conflicts += 1
            if conflicts >= MOVE_CONFLICTS:
                raise ServiceError(
                    f"{model} {channel}: not moved: others moved it {conflicts} times while this was tried"
                ) from error
            _pause(conflicts)
        except ServiceError as error:
            faults += 1
            if not error.retryable or faults >= MOVE_FAULTS:
                raise
            _pause(faults)


# ---- below


def _require_not_deleted(store: ObjectStore, mine: Pointer, replaced: Pointer | None) -> None:
    """For a mover that stood still between its claim and its move: move back if the release is gone. Writes.

    Raises ReleaseError in that case.
    """
    stone = read_tombstone(store, mine.model, mine.release)
    if stone is None or stone.state in (State.KEPT, State.MARKED):
        return
    outcome = "nothing was live before, so this channel has no usable release now"
    if replaced is not None:
        back = replace(
            replaced,
            generation=mine.generation + 1,
            previous=mine.release,
            nonce=uuid.uuid4().hex,
            moved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            reason=f"release {mine.release} was deleted by `ship gc` while its mover stood still",
            kind=ROLLBACK,
            verdicts={},
        )
        outcome = f"the channel went back to {replaced.release}"
        try:
            record(store, mine)
            _put_pointer(store, back, mine)
        except PreconditionFailed:
            outcome = "another mover has followed"
    raise ReleaseError(
        f"{mine.model} {mine.channel}: release {mine.release} was deleted by `ship gc` while its mover stood still for "
        f"more than {CLAIM_HOLDS_SECONDS / 60:.0f} minutes; {outcome}"
    )


def _outcome(store: ObjectStore, tried: Pointer, live: Pointer | None) -> Pointer | None:
    """The pointer as our attempt wrote it, when it took place: still live, or in the history if others followed."""
    if live is None or live.generation < tried.generation:
        return None
    if live.nonce == tried.nonce:
        return live
    if live.generation == tried.generation:
        return None
    # Whoever replaced ours made sure first that it is there.
    key = record_key(tried.model, tried.channel, tried.generation)
    recorded = read_record(store, key)
    return recorded if recorded.nonce == tried.nonce else None


def _put_pointer(store: ObjectStore, pointer: Pointer, live: Pointer | None) -> None:
    """Replace what is live, or create the first pointer. Raises PreconditionFailed when something else is live."""
    key = pointer_key(pointer.model, pointer.channel)
    if live is None:
        store.put_new(key, pointer.encode())
    else:
        store.replace(key, pointer.encode(), live.etag)


def _live_manifest(store: ObjectStore, live: Pointer | None) -> Manifest | None:
    if live is None:
        return None
    try:
        return read_manifest(store, live.model, live.release, sha256=live.manifest_sha256)
    except ReleaseError as error:
        raise ReleaseError(
            f"the live release of {live.model} {live.channel} is broken; no candidate can be held against it: {error}"
        ) from error


def _version(live: Pointer | None) -> str:
    return live.nonce if live else ""


def _pause(times: int) -> None:
    """Wait a random while, longer each time: racers that pause alike meet again."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.01 * 2**times)))

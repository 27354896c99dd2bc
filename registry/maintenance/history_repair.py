"""Records that the history of a channel has lost, written again from what the bucket still knows.

A record is lost when somebody deletes it: movers leave no hole. The pointer holds the last record. Where the bucket
keeps old versions of objects, those of the pointer hold all others, exactly. Without them a record's neighbours still
say which release it was and which it replaced; who moved, when and why is gone. Of two lost neighbours nothing tells
about the older.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from shipreader.records import MANIFEST_BYTES
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import is_recorded, read_history, record, recorded_generations
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer, read_pointer
from train_and_ship.registry.channels.revisions import recorded
from train_and_ship.registry.channels.timeline import holes
from train_and_ship.registry.release.manifest import MANIFEST

REBUILT = "(record lost, rebuilt from its neighbours: who moved, when and why is not known)"
UNPINNED = " (nor how it was described: no other record says so, and this one names what lay in the bucket by then)"


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was, or would be, written again."""

    exact: tuple[int, ...] = ()
    """Generations whose whole record was found."""
    partial: tuple[int, ...] = ()
    """Generations of which only the release is known."""
    lost: tuple[range, ...] = ()
    """Generations that nothing tells about, oldest first, neighbours together."""
    taken: tuple[int, ...] = ()
    """Generations in whose place lies something else, which is never replaced here."""


def repair_history(channel: Channel, *, dry_run: bool = False) -> Repaired:
    """Write every missing record that can be found out. Writes unless dry_run; can be repeated."""
    exact, partial, lost = [], [], list[range]()
    known = {move.generation: move for move in read_history(channel)}
    live, listed = read_pointer(channel), set(recorded_generations(channel))
    if live is not None and not is_recorded(channel, live):
        exact.append(live)
    missing = holes([known[generation] for generation in sorted(known)])
    kept = _kept_versions(channel) if missing else {}
    # Backwards: a record says what it replaced.
    for hole in reversed(missing):
        generation = hole.stop - 1
        while generation >= hole.start:
            if generation in kept:
                exact.append(kept[generation])
            elif (later := known.get(generation + 1)) is not None and later.previous is not None:
                partial.append(_between(channel, known.get(generation - 1), later))
            else:
                # Down to what is kept, in one step: a record may say any number.
                below = max((one for one in kept if hole.start <= one < generation), default=hole.start - 1)
                lost.append(range(below + 1, generation + 1))
                generation = below
                continue
            known[generation] = (exact if generation in kept else partial)[-1]
            generation -= 1
    taken = listed & {move.generation for move in (*exact, *partial)}
    exact, partial = ([move for move in moves if move.generation not in taken] for moves in (exact, partial))
    if not dry_run:
        for move in (*exact, *partial):
            record(channel.store, move)
    return Repaired(
        exact=_numbers(exact),
        partial=_numbers(partial),
        lost=tuple(sorted(lost, key=lambda one: one.start)),
        taken=tuple(sorted(taken)),
    )


def _numbers(moves: Iterable[Pointer]) -> tuple[int, ...]:
    return tuple(sorted(move.generation for move in moves))


def _kept_versions(channel: Channel) -> dict[int, Pointer]:
    """The pointer as it was at each generation, where the bucket keeps versions. What was no pointer is passed over."""
    key = pointer_key(channel.model, channel.name)
    found: dict[int, Pointer] = {}
    for body in channel.store.get_versions(key):
        with contextlib.suppress(ReleaseError):
            move = decode_pointer(body, key)
            if (move.model, move.channel) == (channel.model, channel.name):
                # The newest first: the one that was there longer is not known to be the right one.
                found.setdefault(move.generation, move)
    return found


def _between(channel: Channel, earlier: Pointer | None, later: Pointer) -> Pointer:
    assert later.previous is not None
    sha256, said = _described(channel, later.previous)
    return Pointer(
        model=later.model,
        channel=later.channel,
        generation=later.generation - 1,
        release=later.previous,
        manifest_sha256=sha256,
        previous=earlier.release if earlier else None,
        nonce="",
        moved_at="",
        moved_by="",
        reason=REBUILT + said,
        flow_run="",
        mlflow_version="",
    )


def _described(channel: Channel, release: str) -> tuple[str, str]:
    """Hash of the manifest that a release had when it was live, and for the reason where nobody knows that."""
    with contextlib.suppress(ReleaseError):
        if sha256 := recorded(channel, release).manifest_sha256:
            return sha256, ""
        # Whoever may write releases may have written it since. From here on it is this one.
        manifest = channel.store.get(release_prefix(channel.model, release) + MANIFEST, MANIFEST_BYTES)
        return hashlib.sha256(manifest[0]).hexdigest() if manifest else "", UNPINNED
    # Records contradict each other, or nobody can read it: none is right by itself.
    return "", UNPINNED


def broken_links(moves: Iterable[Pointer]) -> list[str]:
    """Neighbours that contradict each other: what a record says it replaced is not what the one before put live."""
    found = []
    before: Pointer | None = None
    for move in moves:
        # Nothing is said by a record that was rebuilt, nor after somebody deleted the pointer.
        follows = before is not None and before.generation == move.generation - 1 and move.previous is not None
        if before is not None and follows and move.previous != before.release:
            found.append(
                f"generation {move.generation} says that it replaced {move.previous or 'nothing'}, "
                f"but generation {before.generation} put {before.release} live"
            )
        before = move
    return found

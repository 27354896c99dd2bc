"""The moves of a channel, one immutable record for each.

The pointer carries the whole record of its move, and whoever replaces it makes sure first that this record is in the
history: a mover that dies right after its PUT leaves no hole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from shipreader.records import MOST_MOVES
from train_and_ship.infra.errors import ReleaseError, ServiceError
from train_and_ship.infra.objectstore import RECORDS_BYTES, ObjectStore
from train_and_ship.registry.bucket.keys import history_prefix
from train_and_ship.registry.bucket.transfer import in_parallel, put_immutable
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer, read_pointer

READ_AT_ONCE = 8
"""Records, newest first, until the one that is looked for."""
_NAME = re.compile(r"([0-9]{8})\.json")
_log = logging.getLogger(__name__)


def read_history(channel: Channel) -> list[Pointer]:
    """Every move of a channel, oldest first; the last one is what was live when this was called."""
    # The pointer first: by then every older record is in the history.
    live = read_pointer(channel)
    prefix = history_prefix(channel.model, channel.name)
    listed = channel.store.list_keys(prefix)
    # A record of a generation that is still to come is nobody's.
    numbers = [number for number in generations_in(prefix, listed) if live is None or number < live.generation]
    held = sum(listed[record_key(channel.model, channel.name, number)] for number in numbers)
    if held > RECORDS_BYTES:
        raise ReleaseError(
            f"{prefix}: expected records of at most {RECORDS_BYTES:,} bytes in all, got {held:,}: somebody else has "
            "written there"
        )
    records = [move for move in in_parallel(lambda number: _readable(channel, number), numbers) if move is not None]
    return records if live is None else [*records, live]


def _readable(channel: Channel, generation: int) -> Pointer | None:
    """A record, or None for one that was written over or deleted: as lost as any other, and the others are read."""
    try:
        return find_record(channel, generation)
    except ReleaseError as error:
        _log.warning("%s: the record of generation %d cannot be read: %s", channel, generation, error)
        return None


def is_recorded(channel: Channel, move: Pointer) -> bool:
    """Whether the history has this very move."""
    return _readable(channel, move.generation) == move


def recorded_generations(channel: Channel) -> list[int]:
    """The moves of which there is a record, oldest first; whatever else lies there was put there by somebody else."""
    prefix = history_prefix(channel.model, channel.name)
    return generations_in(prefix, channel.store.list_keys(prefix))


def generations_in(prefix: str, keys: Iterable[str]) -> list[int]:
    """As `recorded_generations`, of keys below the prefix of a history."""
    names = [_NAME.fullmatch(key.removeprefix(prefix)) for key in keys]
    return sorted(number for name in names if name is not None and 1 <= (number := int(name[1])) <= MOST_MOVES)


def record_key(model: str, channel: str, generation: int) -> str:
    """Where the record of a move lies."""
    return f"{history_prefix(model, channel)}{generation:08d}.json"


def record(store: ObjectStore, pointer: Pointer, *, probably_there: bool = False) -> None:
    """Make sure that the history has this move. Writes; can be repeated."""
    key = record_key(pointer.model, pointer.channel, pointer.generation)
    put_immutable(store, key, pointer.encode(), "record of another move", probably_there=probably_there)


def record_if_possible(store: ObjectStore, pointer: Pointer) -> None:
    """Write the record of a move unless it is there; the next mover does it where the store refuses now."""
    try:
        record_unless_taken(store, pointer)
    except ServiceError as error:
        # The pointer holds the record, and the next mover or reader of the history uses that.
        _log.warning("generation %d is live; its copy in the history follows later: %s", pointer.generation, error)


def record_unless_taken(store: ObjectStore, pointer: Pointer, *, probably_there: bool = False) -> None:
    """As `record`, but where something else lies in its place, which is said and stops nobody.

    Whoever may write the history could otherwise keep everybody from moving the channel, back among them.
    """
    try:
        record(store, pointer, probably_there=probably_there)
    except ReleaseError as error:
        _log.error("generation %d has no record of its own: %s", pointer.generation, error)


def find_record(channel: Channel, generation: int) -> Pointer | None:
    """The record of one move; None where the history lacks it, as it may lack the last move's for a moment.

    Raises ReleaseError for what is none, and for the record of another move, model or channel.
    """
    key = record_key(channel.model, channel.name, generation)
    found = channel.store.get(key)
    return None if found is None else _decode(found[0], key)


def read_record(store: ObjectStore, key: str) -> Pointer:
    """One record. Raises ReleaseError when it is not there or is none, or is another's."""
    found = store.get(key)
    if found is None:
        raise ReleaseError(f"{key}: expected the record of a move, got none: it was deleted")
    return _decode(found[0], key)


def _decode(encoded: bytes, key: str) -> Pointer:
    move = decode_pointer(encoded, key)
    # One that says another generation would lead whoever goes back in circles.
    if (own := record_key(move.model, move.channel, move.generation)) != key:
        raise ReleaseError(f"{key}: expected the record of that move, got the one of {own}")
    return move


def last_move(channel: Channel, release: str) -> Pointer | None:
    """The newest move that made a release live here; None where it never was."""
    return next(moves_to(channel, release), None)


def moves_to(channel: Channel, release: str) -> Iterator[Pointer]:
    """The moves that made a release live here, newest first, and read in that order.

    What cannot be read of them is passed over: the others tell.
    """
    try:
        live = read_pointer(channel)
    except ReleaseError as error:
        _log.warning("%s: what is live cannot be read: %s", channel, error)
        live = None
    if live is not None and live.release == release:
        yield live
    # A record of a generation that is still to come is nobody's.
    numbers = [number for number in recorded_generations(channel) if live is None or number < live.generation]
    newest = numbers[::-1]
    for start in range(0, len(newest), READ_AT_ONCE):
        for move in in_parallel(lambda number: _readable(channel, number), newest[start : start + READ_AT_ONCE]):
            if move is not None and move.release == release:
                yield move


def first_generation(channel: Channel) -> int:
    """1, or one more than the history knows where somebody deleted the pointer."""
    return max(recorded_generations(channel), default=0) + 1

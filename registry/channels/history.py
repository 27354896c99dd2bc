"""The moves of a channel, one immutable record for each.

The pointer carries the whole record of its move, and whoever replaces it makes sure first that this record is in the
history: a mover that dies right after its PUT leaves no hole.
"""

from __future__ import annotations

import logging

from train_and_ship.infra.errors import ReleaseError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import history_prefix
from train_and_ship.registry.bucket.transfer import in_parallel, put_immutable
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer, read_pointer

_log = logging.getLogger(__name__)


def read_history(channel: Channel) -> list[Pointer]:
    """Every move of a channel, oldest first; the last one is what was live when this was called."""
    # The pointer first: by then every older record is in the history.
    live = read_pointer(channel)
    keys = channel.store.list_keys(history_prefix(channel.model, channel.name))
    records = in_parallel(lambda key: read_record(channel.store, key), keys)
    if live is None:
        return records
    return [move for move in records if move.generation < live.generation] + [live]


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
        record(store, pointer)
    except ServiceError as error:
        # The pointer holds the record, and the next mover or reader of the history uses that.
        _log.warning("generation %d is live; its copy in the history follows later: %s", pointer.generation, error)


def find_record(channel: Channel, generation: int) -> Pointer | None:
    """The record of one move; None where the history lacks it, as it may lack the last move's for a moment."""
    key = record_key(channel.model, channel.name, generation)
    found = channel.store.get(key)
    return None if found is None else decode_pointer(found[0], key)


def read_record(store: ObjectStore, key: str) -> Pointer:
    """One record. Raises ReleaseError when it is not there or is none."""
    found = store.get(key)
    if found is None:
        raise ReleaseError(f"{key}: expected the record of a move, got none: it was deleted")
    return decode_pointer(found[0], key)


def was_live(channel: Channel, release: str) -> bool:
    """Whether a release was live on this channel before, or is. Reads the whole history."""
    return any(move.release == release for move in read_history(channel))


def first_generation(channel: Channel) -> int:
    """1, or one more than the history knows where somebody deleted the pointer."""
    prefix = history_prefix(channel.model, channel.name)
    names = [key.removeprefix(prefix).removesuffix(".json") for key in channel.store.list_keys(prefix)]
    return max((int(name) for name in names if name.isdecimal()), default=0) + 1

"""Versions of a rollout: each replaces the one before by one conditional PUT, and each is kept, once, as it was.

Whoever replaces a version makes sure first that its copy is there: a writer that dies right after its PUT leaves no
hole. It is what the history of a channel does with pointers.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError
from train_and_ship.registry.bucket.keys import rollout_key, rollout_versions_prefix
from train_and_ship.registry.bucket.transfer import in_parallel, put_immutable
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.swap import pause
from train_and_ship.registry.rollouts.record import (
    MOST_VERSIONS,
    ROLLOUT_BYTES,
    Rollout,
    decode_rollout,
    read_rollout,
)

CONFLICTS, FAULTS = 20, 5
"""How often in one change another writer may be faster, and the store may not answer."""
READ_AT_ONCE = 8
_NAME = re.compile(r"([0-9]{8})-([0-9]{4})\.json")
_log = logging.getLogger(__name__)

Make = Callable[[Rollout | None], Rollout]
"""Given the newest version, None where there is none: the next one, or the same where nothing is to be written.

Raises whatever is to keep what there is. Called again when another writer was faster.
"""


def change(channel: Channel, make: Make) -> Rollout:
    """Write the next version of a channel's rollout, once, atomically. Writes; can be repeated.

    Returns:
        What this call wrote, though others may have followed; or what was there and is to stay.

    Raises:
        ReleaseError: what is there is no rollout, or what is to be written is none.
        ServiceError: it could not be done, or not be told, after several attempts: then call again.
        StoreRefusedError: the store has no conditional writes.
    """
    channel.store.probe()
    nonce = uuid.uuid4().hex
    tried: Rollout | None = None
    times: Counter[type[Exception]] = Counter()
    while True:
        try:
            there = read_rollout(channel)
            if tried is not None and (mine := _as_written(channel, tried, there)) is not None:
                return _recorded(channel, mine)
            made = make(there)
            if made is there:
                return there
            if there is not None:
                # Before it is replaced: its own writer may have died.
                _record_unless_taken(channel, there)
            tried = replace(made, number=_number(channel, there, made.generation), nonce=nonce, etag="")
            return _recorded(channel, replace(tried, etag=_put(channel, tried, there)))
        except PreconditionFailedError as error:
            times[PreconditionFailedError] += 1
            if times[PreconditionFailedError] >= CONFLICTS:
                raise ServiceError(
                    f"{channel}: its rollout was not changed: others were faster {CONFLICTS} times"
                ) from error
            pause(times[PreconditionFailedError])
        except ServiceError as error:
            times[ServiceError] += 1
            if not error.retryable or times[ServiceError] >= FAULTS:
                raise
            pause(times[ServiceError])


def read_versions(channel: Channel, most: int | None = None) -> Iterator[Rollout]:
    """Every version of every rollout of a channel, the newest first, and read in that order.

    Copies that cannot be read are passed over: the others tell.

    most: how many copies are looked at.
    """
    newest = read_rollout(channel)
    if newest is not None:
        yield newest
    prefix = rollout_versions_prefix(channel.model, channel.name)
    names = _copies(channel)[::-1][:most]
    for start in range(0, len(names), READ_AT_ONCE):
        found = in_parallel(lambda name: _copy(channel, prefix + _name(*name)), names[start : start + READ_AT_ONCE])
        yield from (copy for copy in found if copy is not None and copy != newest)


def version_key(rollout: Rollout) -> str:
    """Where the copy of a version lies."""
    return rollout_versions_prefix(rollout.model, rollout.channel) + _name(rollout.generation, rollout.number)


# ---- below


def _put(channel: Channel, rollout: Rollout, there: Rollout | None) -> str:
    """The new ETag. Raises PreconditionFailedError when something else is there, ReleaseError for what no reader would
    take."""
    key, body = rollout_key(channel.model, channel.name), rollout.encode()
    if len(body) > ROLLOUT_BYTES:
        raise ReleaseError(
            f"{key}: expected a record of at most {ROLLOUT_BYTES:,} bytes, got {len(body):,}: readers would refuse it; "
            "say why in fewer words, or ship with fewer gates"
        )
    decode_rollout(body, key)
    if there is None:
        return channel.store.put_new(key, body)
    return channel.store.replace(key, body, there.etag)


def _as_written(channel: Channel, tried: Rollout, there: Rollout | None) -> Rollout | None:
    """The version as our attempt wrote it, when it took place: still there, or a copy if others followed."""
    if there is not None and there.nonce == tried.nonce:
        return there
    # Whoever replaced ours made sure first that its copy is there.
    copy = _copy(channel, version_key(tried))
    return copy if copy is not None and copy.nonce == tried.nonce else None


def _number(channel: Channel, there: Rollout | None, generation: int) -> int:
    """Of the next version: copies have it in their names, so it goes on from one rollout to the next of a pointer."""
    if there is not None and there.generation == generation:
        return there.number + 1
    # Somebody may have deleted the object.
    return max((number for known, number in _copies(channel) if known == generation), default=0) + 1


def _recorded(channel: Channel, rollout: Rollout) -> Rollout:
    try:
        _record_unless_taken(channel, rollout)
    except ServiceError as error:
        # The object holds the record; whoever replaces it writes the copy first.
        _log.warning("%s: the copy of its rollout's version %d follows later: %s", channel, rollout.number, error)
    return rollout


def _record_unless_taken(channel: Channel, rollout: Rollout) -> None:
    """Make sure that the copy is there. Something else in its place is said, and stops nobody: `history.py` says why"""
    try:
        put_immutable(channel.store, version_key(rollout), rollout.encode(), "another version of a rollout")
    except ReleaseError as error:
        _log.error("%s: version %d of its rollout has no copy: %s", channel, rollout.number, error)


def _copies(channel: Channel) -> list[tuple[int, int]]:
    """Generation and number of every copy, the oldest first; whatever else lies there was put there by others."""
    prefix = rollout_versions_prefix(channel.model, channel.name)
    found = (_NAME.fullmatch(key.removeprefix(prefix)) for key in channel.store.list_keys(prefix))
    numbers = [(int(name[1]), int(name[2])) for name in found if name is not None]
    return sorted((generation, number) for generation, number in numbers if 1 <= number <= MOST_VERSIONS)


def _copy(channel: Channel, key: str) -> Rollout | None:
    """None for one that is not there, was written over, or is another's."""
    try:
        found = channel.store.get(key, ROLLOUT_BYTES)
        copy = decode_rollout(found[0], key) if found is not None else None
    except ReleaseError as error:
        _log.warning("%s: a version of its rollout cannot be read: %s", channel, error)
        return None
    return copy if copy is not None and version_key(copy) == key else None


def _name(generation: int, number: int) -> str:
    return f"{generation:08d}-{number:04d}.json"

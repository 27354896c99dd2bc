"""Names of releases as people give them: an id or its beginning, a channel, `prod~1`, a version in MLflow."""

from __future__ import annotations

import re
from dataclasses import replace

from train_and_ship.infra.errors import ReleaseError, RequestError
from train_and_ship.registry.bucket.catalog import Named, channels, releases
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record, moves_to
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.identity import is_channel, is_release_id
from train_and_ship.registry.tracking.rest import model_registry

SHORTEST_ID = 4
"""Digits that the beginning of a release id has at least."""
GRAMMAR = (
    f"a release id or at least its first {SHORTEST_ID} digits, a channel (`prod`), what was live on it some moves "
    "before (`prod~1`), or a version in MLflow (`v7`)"
)

_AGO = re.compile(r"(?P<channel>[a-z0-9][a-z0-9._-]*)~(?P<moves>\d{1,8})")
_VERSION = re.compile(r"v([1-9]\d{0,17})")
_ID = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},}}")


def named_release(channel: Channel, text: str) -> Named:
    """The release of the channel's model that `text` names, with the hash that the record has by which it is named.

    Where it is named in another way, or that record lacks it, as in `recorded`, which raises too. A whole id is one,
    whatever channels are called; else a channel's name comes before a version in MLflow, which is asked about versions
    only. A text that is a channel and begins an id is neither: anybody who may make channels could make it mean another
    release. Raises RequestError when it names none, or more than one.
    """
    named = _named(channel, text)
    return named if named.manifest_sha256 else recorded(channel, named.release)


def recorded(channel: Channel, release: str) -> Named:
    """A release, with the hash that the newest record of it has: the channel's, or else of the model's other channels.

    Raises ReleaseError where only other channels have any, and these contradict each other.
    """
    if sha256 := _sha256(channel, release):
        return Named(release, sha256)
    others: dict[str, str] = {}
    for name in channels(channel.store, channel.model):
        if name != channel.name and (sha256 := _sha256(replace(channel, name=name), release)):
            others.setdefault(sha256, name)
    if len(others) > 1:
        raise ReleaseError(
            f"{channel.model}: release {release} had another description when it was live on each of "
            f"{', '.join(others.values())}: name it by the channel that is right (`prod`, `prod~1`)"
        )
    return Named(release, next(iter(others), ""))


# ---- below


def _sha256(channel: Channel, release: str) -> str:
    return next((move.manifest_sha256 for move in moves_to(channel, release) if move.manifest_sha256), "")


def _named(channel: Channel, text: str) -> Named:
    store, model = channel.store, channel.model
    if (ago := _AGO.fullmatch(text)) is not None:
        return _moves_ago(replace(channel, name=ago["channel"]), int(ago["moves"]))
    found = releases(store, model, text) if _ID.fullmatch(text) else []
    if is_release_id(text) and found:
        return Named(text)
    live = read_pointer(replace(channel, name=text)) if is_channel(text) else None
    if live is not None:
        if found:
            raise RequestError(
                f"{model}: {text!r} is a channel, and begins release {found[0]}: give more digits, or {text}~0"
            )
        return _of(live)
    if (version := _VERSION.fullmatch(text)) is not None:
        release = model_registry(channel.tracking_uri).release(model, version[1])
        if release is None:
            raise RequestError(f"{model}: MLflow has no version {version[1]} of a release")
        return Named(release)
    if len(found) == 1:
        return Named(found[0])
    if found:
        raise RequestError(f"{model}: {text!r} begins {len(found)} releases: {', '.join(found[:5])}; give more digits")
    known = ", ".join(channels(store, model)) or "none"
    raise RequestError(f"{model}: expected {GRAMMAR}; got {text!r}, which is none of them. Channels: {known}")


def _of(move: Pointer) -> Named:
    return Named(move.release, move.manifest_sha256)


def _moves_ago(channel: Channel, moves: int) -> Named:
    live = read_pointer(channel)
    if live is None:
        known = ", ".join(channels(channel.store, channel.model)) or "none"
        raise RequestError(f"{channel.model}: nothing is live on {channel.name!r}; channels: {known}")
    if moves == 0:
        return _of(live)
    wanted = live.generation - moves
    if wanted < 1:
        first = f"{channel.name}~{live.generation - 1}"
        raise RequestError(f"{channel.model}: {channel.name}~{moves} is before the first move, which is {first}")
    move = find_record(channel, wanted)
    later = live if moves == 1 else find_record(channel, wanted + 1)
    if move is not None:
        if later is not None and later.previous not in (None, move.release):
            raise RequestError(
                f"{channel}~{moves}: generation {wanted + 1} replaced {later.previous}, but the record of generation "
                f"{wanted} says {move.release}: one of them is not what was written first; name a release"
            )
        return _of(move)
    if later is not None and later.previous is not None:
        # Its own record is lost; whoever replaced it says what it was.
        return Named(later.previous)
    raise RequestError(
        f"{channel}~{moves}: the records of generation {wanted} and of the next are lost; name a release"
    )

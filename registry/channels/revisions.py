"""Names of releases as people give them: an id or its beginning, a channel, `prod~1`, a version in MLflow."""

from __future__ import annotations

import re
from dataclasses import replace

from train_and_ship.infra.errors import RequestError
from train_and_ship.registry.bucket.catalog import channels, releases
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.identity import is_name
from train_and_ship.registry.tracking.rest import model_registry

SHORTEST_ID = 4
"""Digits that the beginning of a release id has at least."""
GRAMMAR = (
    f"a release id or at least its first {SHORTEST_ID} digits, a channel (`prod`), what was live on it some moves "
    "before (`prod~1`), or a version in MLflow (`v7`)"
)

_AGO = re.compile(r"(?P<channel>[a-z0-9][a-z0-9._-]*)~(?P<moves>\d+)")
_VERSION = re.compile(r"v([1-9]\d*)")
_ID = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},}}")


def resolve_release(channel: Channel, text: str) -> str:
    """The id of the release of the channel's model that `text` names; a channel's name comes before anything else.

    MLflow is asked about versions only. Raises RequestError when it names none, or more than one.
    """
    store, model = channel.store, channel.model
    if (ago := _AGO.fullmatch(text)) is not None:
        return _moves_ago(replace(channel, name=ago["channel"]), int(ago["moves"]))
    if is_name(text) and (live := read_pointer(replace(channel, name=text))) is not None:
        return live.release
    if (version := _VERSION.fullmatch(text)) is not None:
        release = model_registry(channel.tracking_uri).release(model, version[1])
        if release is None:
            raise RequestError(f"{model}: MLflow has no version {version[1]} of a release")
        return release
    found = releases(store, model, text) if _ID.fullmatch(text) else []
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{model}: {text!r} begins {len(found)} releases: {', '.join(found[:5])}; give more digits")
    known = ", ".join(channels(store, model)) or "none"
    raise RequestError(f"{model}: expected {GRAMMAR}; got {text!r}, which is none of them. Channels: {known}")


def _moves_ago(channel: Channel, moves: int) -> str:
    live = read_pointer(channel)
    if live is None:
        known = ", ".join(channels(channel.store, channel.model)) or "none"
        raise RequestError(f"{channel.model}: nothing is live on {channel.name!r}; channels: {known}")
    if moves == 0:
        return live.release
    wanted = live.generation - moves
    if wanted < 1:
        first = f"{channel.name}~{live.generation - 1}"
        raise RequestError(f"{channel.model}: {channel.name}~{moves} is before the first move, which is {first}")
    if (move := find_record(channel, wanted)) is not None:
        return move.release
    later = live if moves == 1 else find_record(channel, wanted + 1)
    if later is not None and later.previous is not None:
        # Its own record is lost; whoever replaced it says what it was.
        return later.previous
    raise RequestError(
        f"{channel}~{moves}: the records of generation {wanted} and of the next are lost; name a release"
    )

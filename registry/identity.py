"""What models, channels and releases may be called, and the canonical bytes that hashes are taken of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from shipreader.records import NAME, RELEASE_ID
from train_and_ship.infra.errors import RequestError

RELEASE_ID_DIGITS = 20
"""Hexadecimal digits of a release id: 80 bits."""
RESERVED_CHANNELS = re.compile(r"latest|champion|challenger|previous|.*-previous|v\d+")
"""A channel other than prod is also an MLflow alias, and these are taken; `staging-previous` is of `staging`."""


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """JSON whose bytes depend on nothing but the value. Raises ValueError for NaN and infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_name(text: str) -> bool:
    """Whether a model or channel can be called so: it becomes part of keys."""
    return NAME.fullmatch(text) is not None


def is_release_id(text: str) -> bool:
    """Whether it has the shape of a release id: it becomes part of keys."""
    return RELEASE_ID.fullmatch(text) is not None


def require_name(kind: str, name: str) -> str:
    """The name itself. Raises RequestError unless it can be that of a model or channel: it becomes part of keys."""
    if not is_name(name):
        raise RequestError(
            f"{kind} name: expected 1 to 63 lower-case letters, digits, dots, dashes or underscores, got {name!r}"
        )
    return name


def require_release_id(release: str) -> str:
    """The id itself. Raises RequestError unless it has the shape of a release id: it becomes part of keys."""
    if not is_release_id(release):
        raise RequestError(f"release id: expected {RELEASE_ID_DIGITS} lower-case hexadecimal digits, got {release!r}")
    return release


def may_be_alias(channel: str) -> bool:
    """Whether MLflow can have an alias of that name. Channels with a dot were made before this was asked."""
    return "." not in channel


def require_new_channel(channel: str) -> None:
    """Raises RequestError unless a channel can be made with that name."""
    require_channel(channel)
    if not may_be_alias(channel):
        raise RequestError(
            "channel: expected a name without dots, because MLflow has no alias with one, "
            f"got {channel!r}; {channel.replace('.', '-')} can be one"
        )


def require_channel(channel: str) -> None:
    """Raises RequestError for names that no channel can have: no part of a key, or taken as an alias in MLflow."""
    if not is_name(channel) or RESERVED_CHANNELS.fullmatch(channel):
        raise RequestError(
            "channel: expected 1 to 63 lower-case letters, digits, dots, dashes or underscores, and not latest, "
            "champion, challenger, previous, …-previous or v and digits, which MLflow has other uses for; "
            f"got {channel!r}"
        )

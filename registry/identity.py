"""What models, channels and releases may be called, and the canonical bytes that hashes are taken of."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from shipreader.records import NAME, RELEASE_ID, require_sparse
from train_and_ship.infra.errors import RequestError

RELEASE_ID_DIGITS = 20
"""Hexadecimal digits of a release id: 80 bits."""
RESERVED_CHANNELS = re.compile(r"latest|champion|challenger|previous|.*-previous|v\d+")
"""A channel other than prod is also an MLflow alias, and these are taken; `staging-previous` is of `staging`."""
_FIRST_YEAR, _LAST_YEAR = 1971, 9000


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """JSON whose bytes depend on nothing but the value. Raises ValueError for NaN and infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_object(encoded: bytes) -> dict[str, Any]:
    """A record that somebody else may have written. Raises ValueError unless it is one JSON object.

    Neither NaN nor infinity is JSON, and what holds a great many small values would take far more memory than bytes.
    """
    require_sparse(encoded)
    try:
        document = json.loads(encoded, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("lists within lists, too deep") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    return document


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def moment(text: str) -> datetime:
    """A time as records have it: ISO 8601 with its zone. Raises ValueError for anything else, TypeError for no text."""
    time = datetime.fromisoformat(text)
    # Any sign may stand between day and time, and these are shown as they are.
    if not text.isprintable():
        raise ValueError(f"{text!r} is no text of one line")
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    # Times at the ends of what there is cannot be moved to another zone.
    if not _FIRST_YEAR <= time.year <= _LAST_YEAR:
        raise ValueError(f"{text!r} is not of this age")
    return time


def is_name(text: str) -> bool:
    """Whether a model or channel can be called so: it becomes part of keys."""
    return NAME.fullmatch(text) is not None


def is_release_id(text: str) -> bool:
    """Whether it has the shape of a release id: it becomes part of keys."""
    return RELEASE_ID.fullmatch(text) is not None


def is_channel(text: str) -> bool:
    """Whether a channel can be called so, which some can that cannot be made any more."""
    return is_name(text) and RESERVED_CHANNELS.fullmatch(text) is None and not is_release_id(text)


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
    """Whether MLflow can have an alias of that name, and it is no other channel's.

    Channels with a dot were made before this was asked; those with another name that is none, past us.
    """
    return "." not in channel and is_channel(channel)


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
    if not is_channel(channel):
        raise RequestError(
            "channel: expected 1 to 63 lower-case letters, digits, dots, dashes or underscores, and not latest, "
            "champion, challenger, previous, …-previous or v and digits, which MLflow has other uses for, nor the id "
            f"of a release; got {channel!r}"
        )

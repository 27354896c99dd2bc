"""The rollout of a channel: a release that answers a growing share of requests beside what is live.

One object a channel, `rollouts/<channel>.json`, moved by conditional PUT as the pointer is. It names the pointer that
it extends, by generation and nonce, and is void under any other: whatever moves the pointer ends the rollout in that
one write, whoever moves it and whichever version of this package they have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Any

from shipreader.records import MOST_MOVES, MOST_VERDICTS, SHA256
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.bucket.keys import rollout_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.identity import canonical_json, is_name, is_release_id, json_object, moment

WHOLE = 10_000
"""All requests, in hundredths of a percent."""
MOST_STEPS = 100
MOST_VERSIONS = 9_999
"""Of the object under one pointer: as many as its copies have digits for."""
LONGEST_SECONDS = 366 * 24 * 3600
LONGEST_FALLBACK_MS = 3_600_000
ROLLOUT_BYTES = 64 * 1024
"""Readers refuse a longer object."""
LONGEST_KEY = 1024


class State(StrEnum):
    """Whether requests go to the candidate; written into records."""

    RUNNING = "running"
    ENDED = "ended"


class Outcome(StrEnum):
    """What became of a rollout; written into records."""

    NONE = ""
    """It is running."""
    PROMOTED = "promoted"
    """The candidate is live."""
    ROLLED_BACK = "rolled back"
    """The candidate is given up."""
    REPLACED = "replaced"
    """Another release went live meanwhile."""
    UNDECIDED = "undecided"
    """It was not at its end by its deadline, and the candidate is given up."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One version of the object: a candidate, its share of the requests, and who said so."""

    model: str
    channel: str
    generation: int
    """Of the pointer that it extends."""
    extends: str
    """Nonce of that pointer."""
    release: str
    """Id of the candidate."""
    manifest_sha256: str
    """Hexadecimal SHA-256 of the candidate's MANIFEST.json."""
    number: int = 0
    """1 for the first version of the object under its pointer, one more for each; set when it is written."""
    rollout: str
    """Random; all versions of one rollout have it."""
    nonce: str = ""
    """Random; by it a writer knows its own version; set when it is written."""
    state: State = State.RUNNING
    outcome: Outcome = Outcome.NONE
    steps: tuple[int, ...]
    """Shares in hundredths of a percent, rising, of which the last is WHOLE."""
    step: int = 0
    """Index of the share that is served."""
    every: int
    """Seconds that a step lasts at least, by the store's clock."""
    deadline: str
    """When it ends undecided: UTC, ISO 8601, by the store's clock."""
    key: str
    """Name of what requests are split by."""
    fallback_ms: int = 0
    """Milliseconds after which a request falls back to the live release; 0 for no such limit."""
    shadow: bool = False
    """Whether the live release answers and the candidate is only asked beside it."""
    stop_if: Mapping[str, Any] = field(default_factory=dict)
    observe: Mapping[str, Any] = field(default_factory=dict)
    """Both are for whoever watches it, and handed on as they are."""
    started_at: str
    """UTC, ISO 8601, by the store's clock."""
    moved_at: str
    """When this version was made, likewise: the step that is served began then."""
    moved_by: str
    reason: str
    """Of this version."""
    why: str = ""
    """Why the rollout was started."""
    flow_run: str = ""
    """Id of the flow run that made this version; empty outside a flow."""
    mlflow_version: str = ""
    """Of the candidate; empty where it has none."""
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """What was asked before the first step, by gate, in words; the record of the candidate's move has it too."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Keys that this version of the package does not know, handed on as they are."""
    etag: str = field(default="", compare=False)
    """The object's ETag when it was read; no part of the record."""

    @property
    def share(self) -> int:
        """Of the requests that have a key, in hundredths of a percent."""
        return self.steps[self.step]

    @property
    def is_running(self) -> bool:
        """Whether it says so itself; under another pointer it is void all the same."""
        return self.state is State.RUNNING

    @property
    def is_last_step(self) -> bool:
        """Whether the candidate has all requests, and would go live next."""
        return self.step == len(self.steps) - 1

    def extends_pointer(self, live: Pointer | None) -> bool:
        """Whether what is live is what it was started beside."""
        return live is not None and (live.generation, live.nonce) == (self.generation, self.extends)

    def stands_under(self, live: Pointer | None) -> bool:
        """Whether requests go to the candidate."""
        return self.is_running and self.extends_pointer(live)

    @property
    def next_at(self) -> datetime:
        """When the step that is served has stood long enough, by the store's clock."""
        return moment(self.moved_at) + timedelta(seconds=self.every)

    def encode(self) -> bytes:
        """The record as canonical JSON."""
        record = {name: getattr(self, name) for name in _KEYS}
        return canonical_json({**self.further, **record, "format": _FORMAT, "share": self.share})

    def __str__(self) -> str:
        """As messages call it: `release 3f2a… at 5 %, step 2 of 4`."""
        asked = "asked beside the live one about" if self.shadow else "at"
        return f"release {self.release} {asked} {percent(self.share)}, step {self.step + 1} of {len(self.steps)}"


_FORMAT = 1
_KEYS = tuple(item.name for item in fields(Rollout) if item.name not in ("further", "etag"))
_NONCE = re.compile(r"[0-9a-f]{32}")
_TEXTS = (
    *("model", "channel", "release", "manifest_sha256", "extends", "rollout", "nonce", "deadline", "key"),
    *("started_at", "moved_at", "moved_by", "reason", "why", "flow_run", "mlflow_version"),
)
_WHOLE_NUMBERS = ("generation", "number", "step", "every", "fallback_ms")


def percent(share: int) -> str:
    """A share as people write it: `0.5 %`."""
    return f"{share / 100:g} %"


def read_rollout(channel: Channel) -> Rollout | None:
    """The newest version of a channel's rollout, with the ETag it was read under; None where there never was one.

    Raises ReleaseError for an object that is none, or another's.
    """
    key = rollout_key(channel.model, channel.name)
    found = channel.store.get(key, ROLLOUT_BYTES)
    if found is None:
        return None
    rollout = decode_rollout(found[0], key)
    if (rollout.model, rollout.channel) != (channel.model, channel.name):
        raise ReleaseError(f"{key}: expected the rollout of {channel}, got {rollout.model} {rollout.channel}")
    return replace(rollout, etag=found[1])


def decode_rollout(encoded: bytes, key: str) -> Rollout:
    """Raises ReleaseError unless it is what `Rollout.encode` writes, or a later version with further keys."""
    try:
        document = json_object(encoded)
        if document.get("format") != _FORMAT:
            raise ReleaseError(f"{key}: expected format {_FORMAT}, got {str(document.get('format'))[:80]!r}")
        known = {name: document[name] for name in _KEYS if name in document}
        rollout = Rollout(
            **{
                **known,
                "state": State(document["state"]),
                "outcome": Outcome(document["outcome"]),
                "steps": tuple(document["steps"]),
                "further": {name: said for name, said in document.items() if name not in (*_KEYS, "format", "share")},
            }
        )
        _require_sound(rollout)
        if rollout.encode() != encoded:
            raise ValueError("other keys or another spelling")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"[:300]
        raise ReleaseError(f"{key}: expected the record of a rollout, got {said}") from None
    return rollout


def _require_sound(rollout: Rollout) -> None:
    """Raises ValueError or TypeError for values that no rollout has."""
    texts = [getattr(rollout, name) for name in _TEXTS] + [text for item in rollout.verdicts.items() for text in item]
    numbers = [*(getattr(rollout, name) for name in _WHOLE_NUMBERS), *rollout.steps]
    mappings = (rollout.stop_if, rollout.observe, rollout.verdicts)
    sound = (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and type(rollout.shadow) is bool
        and all(isinstance(mapping, dict) for mapping in mappings)
    )
    if not sound:
        raise TypeError("a value of another type")
    if len(rollout.verdicts) > MOST_VERDICTS:
        raise ValueError(f"expected at most {MOST_VERDICTS:,} verdicts, got {len(rollout.verdicts):,}")
    if not is_name(rollout.model) or not is_name(rollout.channel):
        raise ValueError(f"the names {rollout.model!r} and {rollout.channel!r}")
    if not is_release_id(rollout.release) or not SHA256.fullmatch(rollout.manifest_sha256):
        raise ValueError("expected a release id and a SHA-256")
    if not all(_NONCE.fullmatch(said) for said in (rollout.rollout, rollout.nonce)):
        raise ValueError("rollout and nonce: expected 32 hexadecimal digits")
    if not 1 <= rollout.generation <= MOST_MOVES or not 1 <= rollout.number <= MOST_VERSIONS:
        raise ValueError(f"generation {rollout.generation}, number {rollout.number}")
    if not 1 <= len(rollout.steps) <= MOST_STEPS or not are_steps(rollout.steps):
        raise ValueError(f"steps: expected 1 to {MOST_STEPS} shares that rise to {WHOLE:,}")
    if not 0 <= rollout.step < len(rollout.steps):
        raise ValueError(f"step {rollout.step} of {len(rollout.steps)}")
    if not 1 <= rollout.every <= LONGEST_SECONDS or not 0 <= rollout.fallback_ms <= LONGEST_FALLBACK_MS:
        raise ValueError(f"every {rollout.every} s, fallback_ms {rollout.fallback_ms}")
    if not 1 <= len(rollout.key) <= LONGEST_KEY or not rollout.key.isprintable():
        raise ValueError(f"key: expected 1 to {LONGEST_KEY:,} printable characters")
    if rollout.is_running is not (rollout.outcome is Outcome.NONE):
        raise ValueError(f"state {rollout.state.value} with the outcome {rollout.outcome.value!r}")
    if not moment(rollout.started_at) <= moment(rollout.deadline):
        raise ValueError("a deadline before its start")
    moment(rollout.moved_at)


def are_steps(steps: tuple[int, ...]) -> bool:
    """Whether shares rise, each by something, from above nothing to all requests."""
    return steps[0] > 0 and all(low < high for low, high in pairwise(steps)) and steps[-1] == WHOLE

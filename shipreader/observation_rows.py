"""What an observer keeps in memory until it is written, and which of it."""

from __future__ import annotations

import random
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

from shipreader.observation_files import LONGEST_VECTOR
from shipreader.split import slot_of


@dataclass(slots=True)
class ObservedRow:
    """One request, as it waits in memory."""

    at: float
    request_id: str
    key: str | int | None
    latency_ms: float | None
    error: str
    release: str
    generation: int
    rollout: str
    arm: str
    fell_back: bool
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    def document(self, model: str) -> dict[str, Any]:
        """As it is written."""
        return {
            "request_id": self.request_id,
            "key_slot": slot_of(model, self.key),
            "time": _iso(self.at),
            "release": self.release,
            "generation": self.generation,
            "rollout": self.rollout,
            "arm": self.arm,
            "latency_ms": self.latency_ms,
            "error": self.error,
            "fell_back": self.fell_back,
            "inputs": self.inputs,
            "outputs": self.outputs,
        }


@dataclass(slots=True)
class LabelRow:
    """What has turned out to be true of a request, as it waits in memory."""

    at: float
    request_id: str
    name: str
    value: Any
    size: int = 0

    def document(self, model: str) -> dict[str, Any]:
        """As it is written."""
        return {"request_id": self.request_id, "time": _iso(self.at), "name": self.name, "value": self.value}


def _iso(at: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at % 1 * 1000):03}Z"


def sampled(request_id: str, share: float) -> bool:
    """By the id, so that the live answer and a shadow's to one request are both kept, or neither."""
    if not request_id:
        return random.random() < share
    return zlib.crc32(request_id.encode(errors="replace")) < share * 2**32


def flattened(value: Any) -> list[Any] | None:
    """The numbers of lists within lists; None for more than a vector may have, or anything else in it."""
    flat: list[Any] = []
    pending = [value]
    # Whatever lists hold one another: each step takes a list or a number.
    for _ in range(4 * LONGEST_VECTOR):
        if not pending:
            return flat
        one = pending.pop()
        if isinstance(one, list | tuple):
            if len(one) > LONGEST_VECTOR or len(pending) > LONGEST_VECTOR:
                return None
            pending += reversed(one)
        elif type(one) in (bool, int, float):
            flat.append(one)
        else:
            return None
        if len(flat) > LONGEST_VECTOR:
            return None
    return None

"""Waiting for one descriptor."""

from __future__ import annotations

import math
import select


def readable(descriptor: int, seconds: float | None = None) -> bool:
    """Whether there is something to read, or its end, within `seconds`; without them it waits as long as that takes.

    By poll, because select refuses a descriptor above 1023, and a process that serves or trains may have more open.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else math.ceil(seconds * 1000)))

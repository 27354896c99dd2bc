"""How often a candidate may leave its requests to the live release, and how much may be computed on the side."""

from __future__ import annotations

import threading
from collections import deque

WINDOW_REQUESTS = 1000
MOST_FALLBACKS = 50
"""5 % of the window."""
SHADOW_SHARE = 0.2
"""Of the time, at most, in which a candidate computes that is asked on the side."""
SHADOW_WAITING = 8
"""Requests that wait for it, at most; one more is dropped."""


def rest_after(seconds: float, share: float = SHADOW_SHARE) -> float:
    """How long to do nothing after so many seconds of computing, so that no more than this share of the time is."""
    return seconds * (1 / share - 1)


class Allowance:
    """Of one process and one version of a rollout. Safe to use from many threads."""

    def __init__(self) -> None:
        self.spent = False
        """Whether more than 50 of the last 1,000 requests were left to the live release. It stays so."""
        self._requests = 0
        self._fallen: deque[int] = deque()
        """At which request."""
        self._lock = threading.Lock()

    def request(self) -> None:
        """One more, for whichever release."""
        # Without the lock: a few that are not counted make it stricter.
        self._requests += 1

    def fall_back(self) -> bool:
        """The candidate did not answer one of them; whether that was the one too many."""
        with self._lock:
            self._fallen.append(self._requests)
            while self._fallen[0] <= self._requests - WINDOW_REQUESTS:
                self._fallen.popleft()
            if self.spent or len(self._fallen) <= MOST_FALLBACKS:
                return False
            self.spent = True
            return True


def words(why: str) -> str:
    """For a status. why: what the last fallback was for."""
    return (
        f"this process stands back until the rollout's next change: the candidate left more than {MOST_FALLBACKS} of "
        f"{WINDOW_REQUESTS:,} requests to the live release, the last one for {why}"
    )

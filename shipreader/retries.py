"""What failed is tried again, ever more seldom."""

from __future__ import annotations

import time
from dataclasses import dataclass

LONGEST_PAUSE_SECONDS = 300.0
"""Between two downloads of a release that was refused, and two calls of a callback that failed with one; another move
of the channel, or of a rollout, is tried at once."""


@dataclass(frozen=True)
class Failure:
    """Something that is tried again, ever more seldom."""

    with_what: object
    """The ETag of a pointer that led to something bad, or the release with which a callback failed."""
    error: BaseException
    pause: float
    until: float
    """On the monotonic clock: not tried again before."""

    @staticmethod
    def after(earlier: Failure | None, with_what: object, error: BaseException, first: float) -> Failure:
        """The failure that follows an earlier one.

        Args:
            earlier: the one before, with whatever it was.
            with_what: what failed now.
            error: what it raised.
            first: seconds to the second try; twice as many to each that follows.
        """
        if earlier is not None and earlier.with_what == with_what:
            first = earlier.pause * 2
        pause = min(LONGEST_PAUSE_SECONDS, first)
        return Failure(with_what, error, pause, time.monotonic() + pause)

    def rests(self, with_what: object) -> bool:
        """Whether it is too early to try this again."""
        return self.with_what == with_what and time.monotonic() < self.until

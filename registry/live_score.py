"""A live release that scores far below its own record: it is another one, or the data is. No store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from train_and_ship.registry.kind import LIVE_SCORE, Kind, KindChange
from train_and_ship.registry.text import number

SURE = 3.29
"""Standard errors on both sides of a mean between which it is in 999 of 1,000 cases."""
PART_LOST = 0.5
"""A live release contradicts its record when it has lost more than this part of what it knew."""
TIMES_WORSE = 10
"""The same where nobody can tell what a model scores that knows nothing, and less is better."""
FEW = 50
"""Samples below which a metric in user code, whose spread nobody knows, contradicts nothing."""


@dataclass(frozen=True, kw_only=True)
class LiveScore:
    """How a live release does today, each metric at its worst over the formats."""

    samples: int
    scored: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation of one sample's value, of metrics that are means over samples."""
    constant: Mapping[str, float] = field(default_factory=dict)
    """What the best answer that is always the same scores on these samples, of the same metrics."""
    widths: Mapping[str, float] = field(default_factory=dict)
    """How wide the interval of the candidate's improvement is, of every metric that has one."""

    def contradictions(self, record: Kind, better: Callable[[str], Literal["higher", "lower"]]) -> list[KindChange]:
        """Metrics in which the release is far worse than its own record says: not by chance, and not by a little.

        Data drifts, and a model that ages is what retraining is for. What counts is a release that has lost more than
        half of what it knew, where knowing nothing is the best constant answer on these samples.

        Args:
            record: The live release.
            better: Which direction of a metric is better.
        """
        return [
            KindChange(
                kind=LIVE_SCORE, of=f"{name} of the live release", live=f"{number(said)} in its own record",
                candidate=f"{number(now)} on these {self.samples:,} samples",
            )
            for name, now in self.scored.items()
            if (said := record.metrics.get(name)) is not None
            and self._contradicts(name, now, said, record.samples or self.samples, better(name))
        ]  # fmt: skip

    def _contradicts(self, name: str, now: float, said: float, samples: int, better: str) -> bool:
        loss = said - now if better == "higher" else now - said
        if not math.isfinite(now) or not math.isfinite(said):
            return math.isfinite(said)
        if loss <= 0:
            return False
        if name in self.constant and name in self.spread:
            nothing = self.constant[name]
            knew = said - nothing if better == "higher" else nothing - said
            # As if both were drawn from one distribution, which is what is doubted. A record may say 1e200, whose
            # square is no number.
            spread = math.hypot(self.spread[name], loss / 2)
            error = spread * math.sqrt(1 / self.samples + 1 / samples)
            return 0 < PART_LOST * knew < loss and loss > SURE * error
        width = self.widths.get(name)
        if said <= 0 or width is None or min(self.samples, samples) < FEW:
            return False
        far = now < PART_LOST * said if better == "higher" else now > TIMES_WORSE * said
        return far and loss > 2 * width

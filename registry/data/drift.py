"""How far two distributions are apart, from what each release keeps of its data. SciPy, imported when it is asked.

A column is told by its percentiles, which are values that occur. They stand for the sample: the two statistics are
theirs, to a step of 1 %. Whether a statistic is more than chance is asked with the number of values behind them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train_and_ship.infra.shown import on_one_line

SURE = 0.999
"""A statistic below what two samples of one distribution reach with this probability is no drift."""
LEAST_SHARE = 0.005
"""Half a step of the percentiles: an empty bin is taken for this much, as its logarithm has to exist."""
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One statistic of one column."""

    value: float
    chance: float
    """What samples of these sizes from one distribution stay below, at SURE."""

    def beyond(self, limit: float) -> bool:
        """Whether it is above the limit, and above what chance explains."""
        return self.value > limit and self.value > self.chance


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Shares of two samples in the bins of the first."""

    names: Sequence[str]
    before: Sequence[float]
    now: Sequence[float]


def bins_of_columns(before: Sequence[float], now: Sequence[float]) -> Bins:
    """In the deciles of the first. before, now: percentiles, ascending; not empty."""
    import numpy as np

    first, second = np.asarray(before), np.asarray(now)
    deciles = first[:: (len(first) - 1) // BINS]
    # What lies below the smallest or above the largest value has bins of its own.
    edges = np.unique([np.nextafter(deciles[0], -np.inf), *deciles[1:]])
    # A value that is an edge belongs to the bin that it ends.
    shares = [
        np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1) / len(values)
        for values in (first, second)
    ]
    ends = [f"{edge:.4g}" for edge in (deciles[0], *edges[1:])]
    between = [low if low == high else f"{low} to {high}" for low, high in itertools.pairwise(ends)]
    return Bins(names=[f"< {ends[0]}", *between, f"> {ends[-1]}"], before=shares[0].tolist(), now=shares[1].tolist())


def bins_of_labels(before: Mapping[str, int], now: Mapping[str, int]) -> Bins:
    """Two counts by label as shares of the same bins, one a label. Neither may be of no samples."""
    names = list(dict.fromkeys([*before, *now]))
    all_before, all_now = sum(before.values()), sum(now.values())
    return Bins(
        names=names,
        before=[before.get(name, 0) / all_before for name in names],
        now=[now.get(name, 0) / all_now for name in names],
    )


def most_frequent(bins: Bins, most: int, longest: int) -> Bins:
    """The same with the most frequent bins alone, in their order, and one for all others: what is kept and drawn.

    Args:
        bins: One a label.
        most: How many stay.
        longest: Characters of a name.
    """
    rows = list(zip(bins.names, bins.before, bins.now, strict=True))
    kept = set(sorted(range(len(rows)), key=lambda place: -max(rows[place][1:]))[:most])
    shown = [row for place, row in enumerate(rows) if place in kept]
    others = [row for place, row in enumerate(rows) if place not in kept]
    if others:
        shown.append((f"{len(others):,} others", sum(row[1] for row in others), sum(row[2] for row in others)))
    return Bins(
        names=[on_one_line(name, longest) for name, _, _ in shown],
        before=[before for _, before, _ in shown],
        now=[now for _, _, now in shown],
    )


def psi(bins: Bins, before: int, now: int, least: float = LEAST_SHARE) -> Shift:
    """Population stability index: the relative entropy there and back.

    Of samples of one distribution it is chi-squared times (1/before + 1/now), with a degree less than there are bins
    (Yurdakul, "Statistical Properties of Population Stability Index", 2018).

    Args:
        bins: Shares of both samples.
        before: How many values are behind the shares of the first.
        now: The same of the second.
        least: What an empty bin is taken for.
    """
    from scipy import stats

    first, second = ([max(share, least) for share in shares] for shares in (bins.before, bins.now))
    value = float(stats.entropy(first, second) + stats.entropy(second, first))
    chance = float(stats.chi2.ppf(SURE, max(1, len(bins.names) - 1))) * (1 / before + 1 / now)
    return Shift(value=value, chance=chance)


def ks(before: Sequence[float], now: Sequence[float], values_before: int, values_now: int) -> Shift:
    """Two-sample Kolmogorov-Smirnov: the largest distance of the distribution functions.

    Args:
        before: Percentiles, ascending.
        now: The same of the second sample.
        values_before: How many values the first stand for.
        values_now: The same of the second.
    """
    from scipy import stats

    value = float(stats.ks_2samp(now, before, method="asymp").statistic)
    chance = float(stats.kstwobign.ppf(SURE)) * (1 / values_before + 1 / values_now) ** 0.5
    return Shift(value=value, chance=chance)

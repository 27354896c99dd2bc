"""How far the difference between two models may be chance: a paired bootstrap over the validation samples.

Both models are scored on the same samples, so that what makes a sample hard cancels. Samples are drawn with
replacement, as many as there are, and the difference is computed anew; the interval is between two quantiles of these
differences (the percentile bootstrap of Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

Samples that come in groups (frames of a film) are no independent draws. Whole groups are then drawn, as many as there
are, each with all its samples (the cluster bootstrap: Davison and Hinkley, "Bootstrap Methods and their Application",
1997, section 3.8). Groups are few where samples are many, and the percentile interval of few draws is too narrow: its
quantiles are moved outwards as Student's t does it for a mean (the expanded percentile interval: Hesterberg, "What
Teachers Should Know about the Bootstrap", 2015, https://doi.org/10.1080/00031305.2015.1089789, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from statistics import NormalDist

import torch
from torch import Tensor

from torchworker.contract import Interval, Resampling, fewest_groups
from torchworker.process.fork import CrashNote, run_parallel

AT_ONCE = 4_000_000
"""Indices drawn in one piece: 32 MB."""
MANY_GROUPS = 1000
"""From so many on Student's t is taken for the normal distribution: it is a thousandth wider."""


def count_groups(groups: Tensor | None) -> int:
    """How many there are. groups: the number of each sample's, [samples] int64; 0 for None."""
    return 0 if groups is None else len(torch.unique(groups))


def interval_of_mean(gains: Tensor, asked: Resampling, groups: Tensor | None = None) -> Interval | None:
    """Of a metric that is the mean of one number a sample.

    Args:
        gains: [samples], how much better each sample went.
        asked: how many resamples, which confidence and seed.
        groups: the number of each sample's group, [samples] int64; None where samples are independent.

    Returns:
        None where there are too few groups to say.
    """
    gains = gains.to(torch.float64)
    if groups is None:
        means = [gains[index].mean(1) for index in _draws(len(gains), asked)]
        return _between(torch.cat(means), asked)
    numbers = torch.unique(groups, return_inverse=True)[1]
    sizes = torch.bincount(numbers).to(torch.float64)
    if len(sizes) < fewest_groups(asked.confidence):
        return None
    sums = torch.zeros_like(sizes).index_add_(0, numbers, gains)
    means = [sums[index].sum(1) / sizes[index].sum(1) for index in _draws(len(sizes), asked)]
    return _between(torch.cat(means), asked, len(sizes))


def interval_of(
    gain: Callable[[Tensor], float],
    samples: int,
    asked: Resampling,
    groups: Tensor | None = None,
    processes: int = 1,
) -> Interval | None:
    """Of any metric, at most thousands of calls of somebody's function, which forks of this process share.

    Args:
        gain: how much better the candidate is on the samples with these indices, [samples] int64.
        samples: how many there are.
        asked: how many resamples, which confidence and seed.
        groups: the number of each sample's group, [samples] int64; None where samples are independent.
        processes: forks that share the work; 1 does it here.

    Returns:
        None where there are too few groups to say.

    Raises:
        ChildDiedError: a fork ended without an answer. Whatever `gain` raises comes through.
    """
    members = _members(groups) if groups is not None else []
    if groups is not None and len(members) < fewest_groups(asked.confidence):
        return None
    drawn = partial(_share, gain, samples, members, asked, processes)
    shares = {str(share): partial(drawn, share) for share in range(processes)}
    if processes == 1:
        gains = shares["0"]()
    else:
        begun = run_parallel(shares, {share: CrashNote() for share in shares}, processes)
        gains = [value for _, share in begun for value in share.result()]
    return _between(torch.tensor(gains, dtype=torch.float64), asked, len(members))


def _members(groups: Tensor) -> list[Tensor]:
    """Places of the samples of each group."""
    numbers, sizes = torch.unique(groups, return_inverse=True, return_counts=True)[1:]
    return list(numbers.argsort(stable=True).split(sizes.tolist()))


def _share(
    gain: Callable[[Tensor], float], samples: int, members: list[Tensor], asked: Resampling, shares: int, share: int
) -> list[float]:
    drawn = (index for draws in _draws(len(members) or samples, asked) for index in draws)
    mine = islice(drawn, share, None, shares)
    if members:
        return [gain(torch.cat([members[group] for group in index.tolist()])) for index in mine]
    return [gain(index) for index in mine]


def _draws(size: int, asked: Resampling) -> Iterator[Tensor]:
    """Indices with replacement, [some resamples, size]; the same for the same seed, whoever asks."""
    generator = torch.Generator().manual_seed(asked.seed)
    rows = max(1, AT_ONCE // size)
    for start in range(0, asked.resamples, rows):
        shape = (min(rows, asked.resamples - start), size)
        yield torch.randint(size, shape, generator=generator)


def _between(gains: Tensor, asked: Resampling, groups: int = 0) -> Interval:
    """gains: [resamples]; groups: how many were drawn from, 0 for single samples."""
    tail = _tail(asked.confidence, groups) if groups else (1 - asked.confidence) / 2
    low, high = torch.quantile(gains, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low=low, high=high)


def _tail(confidence: float, groups: int) -> float:
    """What is cut off at each end where there are few draws: Φ(−√(k / (k − 1)) · t) for k of them."""
    return NormalDist().cdf(-math.sqrt(groups / (groups - 1)) * _student_t(confidence, groups - 1))


def _student_t(confidence: float, freedom: int) -> float:
    """Between minus this and this Student's t lies with this probability."""
    if freedom > MANY_GROUPS:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(high)


def _inside(angle: float, freedom: int) -> float:
    """P(|t| < √freedom · tan angle): Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (step - 1) / step
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

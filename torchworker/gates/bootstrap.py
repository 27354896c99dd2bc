"""How far the difference between two models may be chance: a paired bootstrap over the validation samples.

Both models are scored on the same samples, so that what makes a sample hard cancels. Samples are drawn with
replacement, as many as there are, and the difference is computed anew; the interval is between two quantiles of these
differences (the percentile bootstrap of Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from torchworker.contract import Interval, Resampling
from torchworker.process.fork import CrashNote, run_parallel

AT_ONCE = 4_000_000
"""Indices drawn in one piece: 32 MB."""


def interval_of_mean(gains: Tensor, asked: Resampling) -> Interval:
    """Of a metric that is the mean of one number a sample. gains: [samples], how much better each sample went."""
    gains = gains.to(torch.float64)
    means = [gains[index].mean(1) for index in _draws(len(gains), asked)]
    return _between(torch.cat(means), asked)


def interval_of(gain: Callable[[Tensor], float], samples: int, asked: Resampling, processes: int = 1) -> Interval:
    """Of any metric, at most thousands of calls of somebody's function, which forks of this process share.

    Args:
        gain: how much better the candidate is on the samples with these indices, [samples] int64.
        samples: how many there are.
        asked: how many resamples, which confidence and seed.
        processes: forks that share the work; 1 does it here.

    Raises:
        ChildDiedError: a fork ended without an answer. Whatever `gain` raises comes through.
    """
    shares = {str(share): partial(_share, gain, samples, asked, share, processes) for share in range(processes)}
    if processes == 1:
        gains = shares["0"]()
    else:
        begun = run_parallel(shares, {share: CrashNote() for share in shares}, processes)
        gains = [value for _, share in begun for value in share.result()]
    return _between(torch.tensor(gains, dtype=torch.float64), asked)


def _share(gain: Callable[[Tensor], float], samples: int, asked: Resampling, share: int, shares: int) -> list[float]:
    drawn = (index for draws in _draws(samples, asked) for index in draws)
    return [gain(index) for index in islice(drawn, share, None, shares)]


def _draws(samples: int, asked: Resampling) -> Iterator[Tensor]:
    """Indices with replacement, [some resamples, samples]; the same for the same seed, whoever asks."""
    generator = torch.Generator().manual_seed(asked.seed)
    rows = max(1, AT_ONCE // samples)
    for start in range(0, asked.resamples, rows):
        size = (min(rows, asked.resamples - start), samples)
        yield torch.randint(samples, size, generator=generator)


def _between(gains: Tensor, asked: Resampling) -> Interval:
    tail = (1 - asked.confidence) / 2
    low, high = torch.quantile(gains, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low=low, high=high)

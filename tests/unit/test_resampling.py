"""The interval of an improvement, beside SciPy's own bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from torchworker.contract import Resampling
from torchworker.gates.bootstrap import interval_of, interval_of_mean
from torchworker.project.metrics import mean_of
from torchworker.stages.rehearse import _influence

ASKED = Resampling(resamples=4000, confidence=0.95, seed=0)


def gains(samples: int = 300, better: float = 0.05) -> torch.Tensor:
    """Of a classifier: most samples go alike, some better and some worse."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(samples, generator=generator)
    return (drawn < 0.05 + better).to(torch.float64) - (drawn > 0.95).to(torch.float64)


def test_it_is_the_interval_that_scipy_gives() -> None:
    mine = interval_of_mean(gains(), ASKED)
    theirs = stats.bootstrap(
        (gains().numpy(),), np.mean, n_resamples=4000, confidence_level=0.95, method="percentile", rng=1
    ).confidence_interval
    assert mine.low == pytest.approx(theirs.low, abs=0.004)
    assert mine.high == pytest.approx(theirs.high, abs=0.004)


def test_a_metric_of_any_kind_gets_the_interval_that_a_mean_gets() -> None:
    values = gains()
    assert interval_of(lambda index: float(values[index].mean()), len(values), ASKED) == interval_of_mean(values, ASKED)


def test_processes_that_share_the_work_give_the_same_interval_and_pass_on_what_goes_wrong() -> None:
    values = gains()
    alone, shared = (interval_of(lambda index: float(values[index].mean()), 300, ASKED, count) for count in (1, 3))
    assert shared == alone
    with pytest.raises(ZeroDivisionError):
        interval_of(lambda index: 1 / 0, 300, ASKED, 3)


def test_it_is_the_same_whenever_it_is_asked_and_other_seeds_differ() -> None:
    assert interval_of_mean(gains(), ASKED) == interval_of_mean(gains(), ASKED)
    other = Resampling(resamples=4000, confidence=0.95, seed=1)
    assert interval_of_mean(gains(), ASKED) != interval_of_mean(gains(), other)


def test_models_that_answer_alike_differ_by_nothing() -> None:
    same = interval_of_mean(torch.zeros(50), ASKED)
    assert (same.low, same.high) == (0.0, 0.0)


def test_it_holds_the_true_difference_about_as_often_as_it_says() -> None:
    asked = Resampling(resamples=400, confidence=0.9, seed=3)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        interval = interval_of_mean(torch.randn(80, generator=generator) + 0.3, asked)
        held += interval.low <= 0.3 <= interval.high
    assert 165 <= held <= 195


def test_a_ratio_of_sums_is_the_mean_of_what_each_sample_makes_of_it_whatever_each_side_counts() -> None:
    generator = torch.Generator().manual_seed(3)
    found = []
    for most in (5, 3):
        counts = torch.randint(0, most, (4000,), generator=generator).to(torch.float64)
        rights = (counts * torch.rand(4000, generator=generator, dtype=torch.float64)).round()
        sums = torch.stack([rights, counts], 1)
        influence = _influence(sums)
        assert float(influence.mean()) == pytest.approx(mean_of(sums), rel=1e-12)
        found.append((sums, influence))
    (one, mine), (other, theirs) = found
    drawn = interval_of(lambda index: mean_of(one[index]) - mean_of(other[index]), 4000, ASKED)
    linear = interval_of_mean(mine - theirs, ASKED)
    assert [linear.low, linear.high] == pytest.approx([drawn.low, drawn.high], abs=1e-3)

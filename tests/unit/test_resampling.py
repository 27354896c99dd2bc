"""The interval of an improvement, beside SciPy's own bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from torchworker.contract import EVENTS, Interval, Resampling, fewest_groups
from torchworker.gates import bootstrap
from torchworker.gates.bootstrap import interval_of, interval_of_mean
from torchworker.project.metrics import mean_of
from torchworker.stages import score
from torchworker.stages.rehearse import _influence
from train_and_ship.tasks.at_work import at_work, at_work_now
from train_and_ship.tasks.rehearse import SHOWN, _resampling

ASKED = Resampling(resamples=4000, confidence=0.95, seed=0)


def gains(samples: int = 300, better: float = 0.05) -> torch.Tensor:
    """Of a classifier: most samples go alike, some better and some worse."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(samples, generator=generator)
    return (drawn < 0.05 + better).to(torch.float64) - (drawn > 0.95).to(torch.float64)


def sure(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def test_it_is_the_interval_that_scipy_gives() -> None:
    mine = sure(interval_of_mean(gains(), ASKED))
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
    alone, shared = (
        interval_of(lambda index: float(values[index].mean()), 300, ASKED, processes=count) for count in (1, 3)
    )
    assert shared == alone
    with pytest.raises(ZeroDivisionError):
        interval_of(lambda index: 1 / 0, 300, ASKED, processes=3)


def test_it_is_the_same_whenever_it_is_asked_and_other_seeds_differ() -> None:
    assert interval_of_mean(gains(), ASKED) == interval_of_mean(gains(), ASKED)
    other = Resampling(resamples=4000, confidence=0.95, seed=1)
    assert interval_of_mean(gains(), ASKED) != interval_of_mean(gains(), other)


def test_models_that_answer_alike_differ_by_nothing() -> None:
    same = sure(interval_of_mean(torch.zeros(50), ASKED))
    assert (same.low, same.high) == (0.0, 0.0)


def test_it_holds_the_true_difference_about_as_often_as_it_says() -> None:
    asked = Resampling(resamples=400, confidence=0.9, seed=3)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        interval = sure(interval_of_mean(torch.randn(80, generator=generator) + 0.3, asked))
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
    drawn = sure(interval_of(lambda index: mean_of(one[index]) - mean_of(other[index]), 4000, ASKED))
    linear = sure(interval_of_mean(mine - theirs, ASKED))
    assert [linear.low, linear.high] == pytest.approx([drawn.low, drawn.high], abs=1e-3)


# ---- samples that come in groups


def trials(groups: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gains of a candidate that is as good as the live release, [samples], with the group of each: frames of films, of
    which each goes better or worse as a whole, by chance. Films differ in length."""
    generator = torch.Generator().manual_seed(groups)
    made = []
    for _ in range(count):
        numbers = torch.arange(groups).repeat_interleave(torch.randint(30, 90, (groups,), generator=generator))
        better = 0.15 * torch.sigmoid(3 * torch.randn(groups, generator=generator))[numbers]
        drawn = torch.rand(len(numbers), generator=generator)
        made.append(((drawn < better).double() - (drawn > 0.85 + better).double(), numbers))
    return made


@pytest.mark.parametrize(
    ("groups", "count"),
    [(12, 100), *(pytest.param(groups, 400, marks=pytest.mark.soak) for groups in (6, 12, 40))],
)
def test_groups_of_samples_hold_the_truth_as_often_as_they_say_and_an_equal_candidate_is_seldom_better(
    groups: int, count: int, request: pytest.FixtureRequest
) -> None:
    threads = torch.get_num_threads()
    # Small sums: threads would wait for each other.
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    asked = Resampling(resamples=200, confidence=0.95, seed=1)
    held = passed = single_held = single_passed = 0
    for gained, numbers in trials(groups, count):
        whole, single = sure(interval_of_mean(gained, asked, numbers)), sure(interval_of_mean(gained, asked))
        held, passed = held + (whole.low <= 0 <= whole.high), passed + (whole.low > 0)
        single_held, single_passed = single_held + (single.low <= 0 <= single.high), single_passed + (single.low > 0)
    assert held >= 0.9 * count and passed <= 0.05 * count, (held, passed)
    # What is taken for independent is not: this is what groups are for.
    assert single_held < 0.8 * count and single_passed > 0.08 * count, (single_held, single_passed)


def test_a_metric_of_any_kind_gets_the_interval_that_a_mean_gets_over_groups_too() -> None:
    gained, numbers = trials(9, 1)[0]
    # In any order, and with any numbers.
    order = torch.randperm(len(gained), generator=torch.Generator().manual_seed(0))
    gained, numbers = gained[order], 7 - 3 * numbers[order]
    of_mean = sure(interval_of_mean(gained, ASKED, numbers))
    for processes in (1, 2):
        of_any = sure(
            interval_of(lambda index: float(gained[index].mean()), len(gained), ASKED, numbers, processes=processes)
        )
        assert [of_any.low, of_any.high] == pytest.approx([of_mean.low, of_mean.high])


def test_many_groups_of_one_sample_are_samples() -> None:
    alike, single = sure(interval_of_mean(gains(), ASKED, torch.arange(300))), sure(interval_of_mean(gains(), ASKED))
    assert [alike.low, alike.high] == pytest.approx([single.low, single.high], abs=2e-3)


def test_of_too_few_groups_there_is_no_interval() -> None:
    assert [fewest_groups(confidence) for confidence in (0.75, 0.9, 0.95, 0.99)] == [3, 5, 6, 8]
    for count, there in ((5, False), (6, True)):
        gained, numbers = trials(count, 1)[0]
        assert (interval_of_mean(gained, ASKED, numbers) is not None) == there
        assert (interval_of(lambda index: 0.0, len(gained), ASKED, numbers) is not None) == there


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 39, 999, 1001])
def test_student_s_t_is_scipy_s(freedom: int) -> None:
    expected = stats.t.ppf((1 + 0.95) / 2, freedom)
    assert bootstrap._student_t(0.95, freedom) == pytest.approx(expected, rel=1e-9 if freedom < 1000 else 2e-3)


def test_resampling_by_a_metric_of_ones_own_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "TOLD_SECONDS", 0.0)
    monkeypatch.setattr(score, "can_fork", lambda: False)
    monkeypatch.setattr(score, "call_metric", lambda metric, outputs, target, project: float(outputs.mean()))
    asked = Resampling(resamples=100, confidence=0.95, seed=0)
    request = SimpleNamespace(folder=str(tmp_path), resampling=asked, project=None)
    metric = SimpleNamespace(name="own", better="higher")
    found = score._interval(metric, (gains(50), gains(50)), torch.zeros(50), None, request)
    assert found["own"] == Interval(low=0.0, high=0.0)
    events = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [event["done"] for event in events] == [number / 100 for number in range(1, 101)]


@pytest.mark.parametrize("event", [{}, {"done": "half"}, {"done": float("nan")}, {"done": 7.0}, {"done": None}])
def test_what_the_code_of_a_job_writes_among_the_events_stops_nothing(event: dict[str, Any]) -> None:
    with at_work("rehearse"):
        _resampling(event)
        assert at_work_now()[0].done is None
        _resampling({"metric": "own\n" * 99, "done": 0.5})
        assert (at_work_now()[0].done, len(at_work_now()[0].said)) == (0.5, len("resampling ") + SHOWN)

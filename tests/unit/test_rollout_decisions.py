"""What decides a rollout: limits as they are written, sums that can be merged, bounds that hold at every look."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from train_and_ship.registry.decision.judgement import Verdict, bounds, excess, judge, needed
from train_and_ship.registry.decision.limits import Limit, StopIf, parse_limit
from train_and_ship.registry.decision.sequential import contrast, student, threshold
from train_and_ship.registry.decision.statistics import SLOTS, Statistics, disagree

SHARE = 2500
USUAL = StopIf.parse({"errors": "+0.5%", "p99_ms": "1.3x"})


def rows(
    count: int, *, seed: int = 0, errors: float = 0.004, candidate_errors: float | None = None, slower: float = 1.0
) -> list[dict[str, Any]]:
    """Requests of 4,000 people while a quarter of them gets the candidate; those of odd slots come from `de`."""
    random = np.random.default_rng(seed)
    people = random.integers(0, SLOTS, 4000)
    slots, latencies, luck = random.choice(people, count), random.lognormal(3, 0.5, count), random.random(count)
    found = []
    for place, (slot, latency, drawn) in enumerate(zip(slots.tolist(), latencies.tolist(), luck.tolist(), strict=True)):
        candidate = slot < SHARE
        rate = candidate_errors if candidate and candidate_errors is not None else errors
        found.append(
            {
                "request_id": f"{seed}-{place}", "key_slot": slot, "rollout": "r", "error": "E" if drawn < rate else "",
                "arm": "candidate" if candidate else "live", "latency_ms": latency * (slower if candidate else 1),
                "fell_back": False, "inputs": {"country": "de" if slot % 2 else "fr"},
            }
        )  # fmt: skip
    return found


def counted(stop_if: StopIf, *parts: Sequence[Any]) -> Statistics:
    statistics = Statistics(stop_if)
    for part in parts:
        statistics.add(part, rollout="r", step=0, share=SHARE)
    return statistics


def verdict(stop_if: StopIf, *parts: list[dict[str, Any]], dwell_passed: bool = True) -> Verdict:
    return judge(counted(stop_if, *parts), step=0, dwell_passed=dwell_passed)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("errors", "+0.5%", Limit(name="errors", kind="errors", text="+0.5%", margin=0.005)),
        ("errors", "2x", Limit(name="errors", kind="errors", text="2x", times=2)),
        ("errors", "+0%", Limit(name="errors", kind="errors", text="+0%")),
        ("p99_ms", " 1.3x ", Limit(name="p99_ms", kind="latency", text="1.3x", times=1.3, quantile=0.99)),
        ("p99.9_ms", "2 x", Limit(name="p99.9_ms", kind="latency", text="2x", times=2, quantile=99.9 / 100)),
        ("disagreement", "2%", Limit(name="disagreement", kind="disagreement", text="2%", times=0, margin=0.02)),
        ("accuracy", -0.01, Limit(name="accuracy", kind="metric", text="-0.01", margin=0.01, less_is_worse=True)),
        ("accuracy", "-1%", Limit(name="accuracy", kind="metric", text="-1%", margin=0.01, less_is_worse=True)),
        # YAML makes a number of +0.2.
        ("my_cost", 0.2, Limit(name="my_cost", kind="metric", text="+0.2", margin=0.2)),
    ],
)
def test_limits_are_read_as_people_write_them(name: str, value: object, expected: Limit) -> None:
    assert parse_limit(name, value) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"errors": "0.5%"}, "+0.5% (half a point more than live) or 2x (twice as many) for errors, not '0.5%'"),
        ({"errors": 0.005}, "for errors, not 0.005"),
        ({"errors": "-1%"}, "for errors, not '-1%'"),
        ({"errors": "+100%"}, "for errors, not '+100%'"),
        ({"errors": "0.9x"}, "for errors, not '0.9x'"),
        ({"errors": True}, "for errors, not True"),
        ({"errors": "1" * 50 + "x"}, "for errors, not '111"),
        ({"p99_ms": "0.9x"}, "1.3x (the candidate's at most 1.3 times live's) for p99_ms, not '0.9x'"),
        ({"p99_ms": "nanx"}, "for p99_ms, not 'nanx'"),
        ({"p99": "1.3x"}, "such as p50_ms, p99_ms or p99.9_ms in stop_if, not p99"),
        ({"p0_ms": "2x"}, "such as p50_ms, p99_ms or p99.9_ms in stop_if, not p0_ms"),
        ({"latency_ms": "2x"}, "such as p50_ms, p99_ms or p99.9_ms in stop_if, not latency_ms"),
        ({"disagreement": "+2%"}, "2% (of the answers in shadow) for disagreement, not '+2%'"),
        ({"accuracy": 0.01}, "accuracy: -0.01, as higher is better, and not 0.01"),
        ({"mean_squared_error": "-0.2"}, "mean_squared_error: +0.2, as lower is better, and not '-0.2'"),
        ({"accuracy": 0}, "for accuracy, not 0"),
        ({"accuracy": math.inf}, "for accuracy, not inf"),
        ({"f1_score": -0.1}, "a mean over requests in stop_if, such as accuracy; f1_score is of all requests at once"),
        ({"by": "country"}, "a limit in stop_if beside by"),
        ({"errors": "2x", "by": 3}, "the name of one column in stop_if.by, not 3"),
        ({"a b": 1}, "in stop_if, not 'a b'"),
        ({f"m{place}": 1 for place in range(9)}, "at most 8 limits in stop_if, not 9"),
    ],
)
def test_what_is_no_limit_is_refused_with_what_would_be_one(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        StopIf.parse(given)
    assert said in str(caught.value)


def test_limits_come_back_from_a_rollouts_record() -> None:
    limits = StopIf.parse({"errors": "+0.05%", "p95_ms": "1.25x", "accuracy": -0.01, "my_cost": 2e-5, "by": "country"})
    assert StopIf.parse(json.loads(json.dumps(limits.document()))) == limits
    assert StopIf.parse({}) == StopIf()


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_threshold_is_where_the_mixture_martingale_reaches_one_over_alpha(alpha: float) -> None:
    tuned_for = 1000.0
    rho = tuned_for / (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1)
    v = np.array([1.0, 30, 1000, 1e5, 1e9])
    x = threshold(v, alpha, tuned_for) * np.sqrt(v / (v + rho))
    martingale = 2 * np.sqrt(rho / (v + rho)) * np.exp(x**2 / 2) * stats.norm.cdf(x)
    # The closed form is a little wider than the exact boundary, and never narrower.
    assert (martingale >= 1 / alpha).all()
    assert (martingale <= 1.11 / alpha).all()


def test_few_clusters_widen_bounds_as_students_distribution_does() -> None:
    z, freedom = np.array([2.0, 3, 4, 40]), np.array([1e9, 10, 4, 10])
    expected = [2.0, stats.t.isf(stats.norm.sf(3), 10), stats.t.isf(stats.norm.sf(4), 4), math.inf]
    assert student(z, freedom) == pytest.approx(expected, rel=1e-6)


def arms(*clusters: tuple[int, float, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of one step: how many clusters, the requests of each and the sum of each."""
    found = [[requests, total] for count, requests, total in clusters for _ in range(count)]
    return np.array(found, dtype=np.float64).T[None]


def test_one_request_a_person_has_the_variance_of_a_share() -> None:
    candidate, live = arms((30, 1, 1), (70, 1, 0), (400, 0, 0)), arms((100, 0, 0), (40, 1, 1), (360, 1, 0))
    found = contrast(candidate, live, times=1, margin=0.0)
    assert found.estimate == pytest.approx(0.3 - 0.1)
    assert found.variance == pytest.approx((0.3 * 0.7 / 100 + 0.1 * 0.9 / 400) * 100 / 99)


def test_requests_of_one_person_are_no_more_evidence_than_the_person() -> None:
    once = arms((30, 1, 1), (70, 1, 0), (400, 0, 0)), arms((100, 0, 0), (40, 1, 1), (360, 1, 0))
    hundredfold = tuple(100 * arm for arm in once)
    first, second = (contrast(*both, times=1, margin=0.0) for both in (once, hundredfold))
    assert second.estimate == pytest.approx(float(first.estimate))
    assert second.variance == pytest.approx(float(first.variance))
    # Independent requests would be a hundred times as sure.
    spread_out = contrast(*(np.repeat(arm, 100, axis=-1) for arm in once), times=1, margin=0.0)
    assert spread_out.variance == pytest.approx(float(first.variance) / 100, rel=0.02)


def test_one_person_who_sends_nearly_everything_shows_nothing() -> None:
    candidate = arms((1, 10_000, 5_000), (50, 1, 0), (200, 0, 0))
    found = contrast(candidate, arms((51, 0, 0), (200, 50, 0)), times=1, margin=0.0)
    assert float(found.estimate) > 0.4
    assert math.isinf(float(found.bound(0.05, 0.005)))


def test_without_a_single_error_nothing_is_shown_before_there_were_enough_requests() -> None:
    limit = USUAL.limits[0]
    for requests, shown in ((1, False), (100, True)):
        candidate, live = arms((100, requests, 0), (900, 0, 0)), arms((100, 0, 0), (900, requests, 0))
        against = excess(limit, candidate, live, None)
        assert bool(bounds(USUAL, limit, against, segment=False)[1] < 0) is shown


def test_hours_with_more_errors_are_no_fault_of_the_candidate_that_had_most_of_them() -> None:
    """Simpson's paradox of a growing share: quiet hours at 10 %, bad ones at 50 %, both arms alike in each."""
    quiet = arms((100, 10, 0.1), (900, 0, 0)), arms((100, 0, 0), (900, 10, 0.1))
    bad = arms((500, 10, 2), (500, 0, 0)), arms((500, 0, 0), (500, 10, 2))
    candidate, live = (np.concatenate(both) for both in zip(quiet, bad, strict=True))
    assert contrast(candidate, live, times=1, margin=0.0).estimate == pytest.approx(0)
    pooled = contrast(candidate.sum(0, keepdims=True), live.sum(0, keepdims=True), times=1, margin=0.0)
    assert float(pooled.estimate) > 0.05


def test_bounds_hold_at_every_look_with_people_who_come_back() -> None:
    """200 rollouts of equal candidates, 50 looks each: a t-test at each look is wrong in a third of them or more."""
    random, limit = np.random.default_rng(3), parse_limit("errors", "+0%")
    stop_if = StopIf(limits=(limit,))
    people, streams = 200, 200
    failing = np.clip(0.05 * random.gamma(0.5, 2, (streams, people)), 0, 0.9)
    counts = np.zeros((streams, 2, people))
    wrong, naive = np.zeros(streams, dtype=bool), np.zeros(streams, dtype=bool)
    chosen = np.arange(people) < people // 4
    for _ in range(50):
        asked = random.poisson(1.0, (streams, people))
        counts += np.stack([asked, random.binomial(asked, failing)], axis=1)
        candidate, live = (counts * mine for mine in (chosen, ~chosen))
        against = excess(limit, candidate[:, None], live[:, None], None)
        wrong |= bounds(stop_if, limit, against, segment=False)[0] > 0
        (n_c, e_c), (n_l, e_l) = candidate.sum(-1).T, live.sum(-1).T
        pooled = (e_c + e_l) / (n_c + n_l)
        naive |= (e_c / n_c - e_l / n_l) / np.sqrt(pooled * (1 - pooled) * (1 / n_c + 1 / n_l)) > 1.645
    assert wrong.mean() <= 0.05
    assert naive.mean() > 0.33


@pytest.fixture(scope="module")
def two_parts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return rows(2000, seed=1), rows(2000, seed=2, candidate_errors=0.02)


def test_parts_counted_apart_are_what_is_counted_at_once(
    two_parts: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    stop_if = StopIf.parse({"errors": "+0.5%", "p99_ms": "1.3x", "by": "country"})
    first = rows(2000, seed=3)
    one_by_one, merged = counted(stop_if, first, *two_parts), counted(stop_if, first)
    for part in two_parts:
        apart = merged.like()
        apart.add(part, rollout="r", step=0, share=SHARE)
        merged.merge(apart)
    assert merged.document() == one_by_one.document()
    assert merged.requests("candidate") == sum(row["arm"] == "candidate" for row in itertools.chain(first, *two_parts))
    with pytest.raises(ValueError, match="the same limits"):
        merged.merge(Statistics(USUAL))


def test_statistics_come_back_from_json_and_stay_small(
    two_parts: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    statistics = counted(USUAL, *two_parts)
    statistics.sums[next(iter(statistics.sums))][1, 7] = 0.1 + 0.2
    text = json.dumps(statistics.document())
    assert len(text) < 60_000
    again = Statistics.of_document(json.loads(text))
    assert again.document() == statistics.document()
    assert judge(again, step=0, dwell_passed=True) == judge(statistics, step=0, dwell_passed=True)


def broken() -> Iterator[dict[str, Any]]:
    good = counted(USUAL, rows(50)).document()
    yield {}
    yield good | {"format": 2}
    yield good | {"stop_if": {"errors": "lots"}}
    yield good | {"latencies": {"live": {"99999": 1}, "candidate": {}}}
    for change in ({"data": "AAAA"}, {"data": 3}, {"type": "O"}, {"type": "<u4"}, {"arm": "other"}, {"step": 10**9}):
        yield good | {"sums": [good["sums"][0] | change]}


def test_what_are_no_statistics_is_refused() -> None:
    for document in broken():
        with pytest.raises(ValueError, match="expected statistics"):
            Statistics.of_document(document)


def test_rows_that_cannot_be_compared_are_counted_apart() -> None:
    good = {"key_slot": 10, "rollout": "r", "arm": "candidate", "latency_ms": 3.0, "error": "", "fell_back": False}
    given = [
        good, good | {"key_slot": 9000, "arm": "live"}, good | {"rollout": ""}, good | {"key_slot": None},
        good | {"arm": "live"}, good | {"key_slot": 9000}, good | {"arm": "shadow"}, good | {"key_slot": 10_000},
        good | {"key_slot": 1.5}, good | {"key_slot": True}, good | {"arm": "?"}, {"rollout": "r"},
    ]  # fmt: skip
    statistics = counted(USUAL, given)
    assert (statistics.requests("candidate"), statistics.requests("live")) == (1, 1)
    assert statistics.apart == {
        "of another rollout, or of a reader that follows none": 1,
        "without a key": 2,
        "answered by another arm than the split says": 3,
        "malformed": 4,
    }


def test_a_request_that_fell_back_to_live_is_an_error_of_the_candidate() -> None:
    good = {"key_slot": 10, "rollout": "r", "arm": "candidate", "latency_ms": 3.0, "error": "", "fell_back": False}
    answered_by_live = good | {"arm": "live", "fell_back": True}
    statistics = counted(USUAL, [good, good | {"fell_back": True}, answered_by_live, good | {"error": "ValueError"}])
    assert statistics.arrays("errors")[0].sum((0, 2)).tolist() == [4, 3]
    assert not statistics.apart


def test_rows_may_be_objects() -> None:
    part = rows(300)
    objects = [SimpleNamespace(**row) for row in part]
    assert counted(USUAL, part).document() == counted(USUAL, objects).document()


def test_latencies_that_are_no_numbers_are_left_out_of_latency_alone() -> None:
    good = {"key_slot": 10, "rollout": "r", "arm": "candidate", "error": ""}
    given: list[object] = [None, "3", math.nan, -1, math.inf, 10**400, 8]
    statistics = counted(USUAL, [good | {"latency_ms": value} for value in given])
    assert statistics.requests("candidate") == 7
    assert statistics.latencies["candidate"].sum() == 1
    assert statistics.latency("candidate", 0.5) == pytest.approx(8, rel=0.02)


def test_answers_in_shadow_are_compared_in_pairs() -> None:
    live = [
        {
            "request_id": str(place), "key_slot": place, "rollout": "r", "arm": "live", "latency_ms": 1.0,
            "outputs": {"label": "a"},
        }
        for place in range(40)
    ]  # fmt: skip
    shadow = [row | {"arm": "shadow", "outputs": {"label": "b" if row["key_slot"] < 5 else "a"}} for row in live[:30]]
    statistics = Statistics(StopIf.parse({"disagreement": "2%", "errors": "+1%"}))
    statistics.add([*live, *shadow], rollout="r", step=0, share=SLOTS, shadow=True)
    assert statistics.arrays("disagreement")[0].sum((0, 2)).tolist() == [30, 5]
    assert (statistics.requests("candidate"), statistics.requests("live")) == (30, 30)
    assert statistics.apart == {"in shadow, without the other answer": 10}


@pytest.mark.parametrize(
    ("live", "other", "expected"),
    [
        ({"y": 1.0}, {"y": 1.0005}, 0), ({"y": 1.0}, {"y": 1.01}, 1), ({"y": "a"}, {"y": "b"}, 1),
        ({"y": 3}, {"y": 4}, 1),
        ({"y": [0.1, 0.9]}, {"y": [0.4, 0.6]}, 0), ({"y": [0.1, 0.9]}, {"y": [0.6, 0.4]}, 1),
        ({"y": [1.0]}, {"y": [1.0001]}, 0), ({"y": [1.0]}, {"y": [1.0, 2.0]}, 1), ({"y": math.nan}, {"y": math.nan}, 0),
        ({"y": 10**400}, {"y": 1.0}, 1),
    ],
)  # fmt: skip
def test_two_answers_differ_in_what_they_say_and_not_in_rounding(live: object, other: object, expected: int) -> None:
    assert disagree(live, other) == expected


def test_answers_without_a_value_in_common_say_nothing() -> None:
    pairs: list[tuple[object, object]] = [({"y": 1}, {"z": 1}), ({}, {}), (None, {"y": 1}), ({"y": None}, {"y": None})]
    assert all(math.isnan(disagree(*pair)) for pair in pairs)


def test_a_candidate_like_live_goes_on_once_the_step_has_stood() -> None:
    statistics = counted(USUAL, rows(2000, seed=4), rows(10_000, seed=5))
    early, later = (judge(statistics, step=0, dwell_passed=passed) for passed in (False, True))
    assert (early.outcome, later.outcome) == ("wait", "next")
    assert early.reason.startswith("the step has not stood for its time: errors 0.")


def test_a_candidate_that_fails_is_rolled_back_in_the_middle_of_its_step_with_the_evidence_in_words() -> None:
    found = verdict(USUAL, rows(12_000, seed=6, candidate_errors=0.03), dwell_passed=False)
    assert found.outcome == "rolled back"
    (words,) = [item.words for item in found.evidence if item.limit.name == "errors"]
    assert found.reason == words
    assert words == (
        "errors 2.8 % [1.8, 3.8] against 0.49 % [0.22, 0.76] after 2,950 requests, of at least 3,129 people in both: "
        "beyond +0.5%"
    )
    assert json.loads(json.dumps(found.document()))["evidence"][0]["outcome"] == "beyond"


def test_a_candidate_that_is_slow_is_rolled_back_with_both_percentiles() -> None:
    found = verdict(USUAL, *(rows(4000, seed=seed, slower=2) for seed in range(3)))
    assert found.outcome == "rolled back"
    (words,) = [item.words for item in found.evidence if item.limit.name == "p99_ms"]
    now, before = (float(part.split()[0]) for part in words.removeprefix("p99_ms ").split(" against ")[:2])
    # exp(3 + 0.5 * 2.326) = 64 ms.
    assert now == pytest.approx(128, rel=0.15)
    assert before == pytest.approx(64, rel=0.15)


def test_what_looks_bad_and_is_not_shown_to_be_waits() -> None:
    found = verdict(USUAL, rows(3000, seed=8, candidate_errors=0.015))
    assert (found.outcome, found.evidence[0].outcome) == ("wait", "open")
    assert found.reason.startswith("errors looks as if it were beyond its limit, which is not shown yet: ")


def test_a_step_with_too_few_requests_waits() -> None:
    assert verdict(USUAL, rows(80)).reason.startswith("10 of 100 requests")
    assert verdict(USUAL).reason.startswith("0 of 100 requests")
    assert verdict(StopIf.parse({"errors": "+0.5%"}), rows(1200)).reason.startswith("257 of 600 requests for errors")


def test_without_limits_time_alone_decides() -> None:
    assert [verdict(StopIf(), dwell_passed=passed).outcome for passed in (False, True)] == ["wait", "next"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("errors", "+0.5%", 600), ("errors", "+0.001%", 10_000), ("errors", "+0%", 100), ("p99_ms", "1.3x", 300),
     ("p50_ms", "1.3x", 100), ("disagreement", "2%", 150), ("accuracy", -0.01, 100)],
)  # fmt: skip
def test_a_narrow_limit_asks_for_more_requests_before_the_next_step(name: str, value: object, expected: int) -> None:
    stop_if = StopIf.parse({name: value})
    assert needed(Statistics(stop_if), stop_if.limits[0]) == expected


def labelled(count: int, right: float, candidate_right: float) -> list[dict[str, Any]]:
    random = np.random.default_rng(4)
    return [
        row | {"labelled": True, "metrics": {"accuracy": float(random.random() < share)}}
        for row in rows(count, seed=9)
        for share in [candidate_right if row["arm"] == "candidate" else right]
    ]


def test_a_metric_decides_as_soon_as_labels_have_come_and_holds_nobody_up_before() -> None:
    stop_if = StopIf.parse({"errors": "+0.5%", "accuracy": -0.01})
    requests = rows(6000, seed=5)
    before = verdict(stop_if, requests)
    assert before.outcome == "next"
    assert before.reason.endswith("accuracy: not measured yet")
    after = verdict(stop_if, requests, labelled(8000, 0.9, 0.8))
    assert after.outcome == "rolled back"
    assert after.reason.startswith(
        "accuracy 0.7993 [0.7687, 0.8299] against 0.8971 [0.8827, 0.9115] after 1,938 requests"
    )
    # Labels are no requests, and a candidate that is better is within.
    better = verdict(stop_if, requests, labelled(8000, 0.8, 0.9))
    assert (better.outcome, better.evidence[1].outcome) == ("next", "within")
    assert better.evidence[0].requests == sum(row["arm"] == "candidate" for row in requests)


def one_country_fails() -> list[dict[str, Any]]:
    """Under 1 % of all requests more, all of them from one country in eight, which is 6 % there."""
    random = np.random.default_rng(11)
    found = []
    for row in rows(12_000, seed=10, errors=0.0):
        country = "at" if row["key_slot"] % 8 == 0 else "de"
        fails = country == "at" and row["arm"] == "candidate" and random.random() < 0.06
        found.append(row | {"inputs": {"country": country}, "error": "E" if fails else ""})
    return found


def test_a_candidate_that_is_bad_for_one_segment_is_caught_where_the_column_is_named() -> None:
    part = one_country_fails()
    named, unnamed = (
        verdict(StopIf.parse({"errors": "+0.5%"} | by), part, dwell_passed=False) for by in ({"by": "country"}, {})
    )
    assert named.outcome == "rolled back"
    assert [(item.segment, item.outcome) for item in named.evidence] == [("", "open"), ("at", "beyond")]
    assert "errors of country at" in named.reason
    assert unnamed.outcome == "wait"


def test_values_of_a_column_are_text_of_others() -> None:
    (row,) = rows(1)
    statistics = counted(
        StopIf.parse({"errors": "+0.5%", "by": "country"}),
        [row | {"inputs": {"country": value}} for value in ("a\n\x1b[31mb", 10**5000, ["x"], None, 3)],
    )
    assert sorted(statistics.segments) == ["(none)", "(others)", "3", "a \\x1b[31mb"]
    assert statistics.requests(row["arm"], segment="(none)") == 3


def test_more_values_than_are_told_apart_are_one_segment() -> None:
    part = [row | {"inputs": {"country": f"c{min(row['key_slot'] % 40, 11)}"}} for row in rows(3000)]
    statistics = counted(StopIf.parse({"errors": "+0.5%", "by": "country"}), part)
    assert len(statistics.segments) == 8
    assert statistics.segments[0] == "c11"
    assert statistics.segments[-1] == "(others)"
    told = sum(statistics.requests("live", segment=name) for name in statistics.segments)
    assert told == statistics.requests("live")

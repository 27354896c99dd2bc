"""What follows from a rollout's statistics: the next step, waiting, or the way back, and why, in words. NumPy.

    verdict = judge(statistics, step=1, dwell_passed=True)
    verdict.outcome, verdict.reason         # "rolled back", "errors 1.9 % [1.5, 2.4] against 0.4 % …: beyond +0.5 %"

It may be asked at any time and as often as one likes: over the whole rollout, with all its looks, limits and steps, the
probability to roll back a candidate that is within every limit is at most FALSE_ALARMS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train_and_ship.registry.decision.limits import Limit, StopIf
from train_and_ship.registry.decision.sequential import Contrast, contrast
from train_and_ship.registry.decision.statistics import MOST_SEGMENTS, Array, Statistics
from train_and_ship.registry.text import number

FALSE_ALARMS = 0.05
"""Of a whole rollout. It is shared out evenly (Bonferroni) among the limits; where a column is named, half of it is the
limits' on everybody, and half is shared out among limits and segments. Steps and looks cost nothing."""
FALSE_CLEARANCES = 0.05
"""Of saying of a candidate beyond a limit that it is shown to be within all: each has to be shown at this level, so
they all are (Berger, Technometrics 24, 1982)."""
SHOWN = 0.05
"""One minus the coverage of intervals of a single arm, at all looks together."""
LEAST_REQUESTS = 100
"""Of the candidate in a step, before it may go on by the rule for what is not shown."""
MOST_NEEDED = 10_000
"""Requests of the candidate that this rule asks for at most, however narrow a limit is."""
MOST_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one limit, for everybody or for one segment. Values of shares are fractions."""

    limit: Limit
    segment: str
    outcome: Literal["beyond", "within", "open", "nothing"]
    """nothing: it was not measured in both arms."""
    words: str
    excess: float
    """Estimate of how far the candidate is beyond the limit; negative: within it."""
    low: float
    """The excess is above this at all looks, but with the limit's part of FALSE_ALARMS."""
    high: float
    """The excess is below this at all looks, but with FALSE_CLEARANCES."""
    requests: int
    """Of the candidate."""

    def document(self) -> dict[str, Any]:
        """As JSON, without numbers that it has not."""
        numbers = {"excess": self.excess, "low": self.low, "high": self.high}
        return {
            "limit": self.limit.name, "segment": self.segment, "outcome": self.outcome, "words": self.words,
            **{name: value for name, value in numbers.items() if math.isfinite(value)}, "requests": self.requests,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done, and the evidence: limits on everybody first, then segments that are beyond one."""

    outcome: Literal["next", "wait", "rolled back"]
    reason: str
    evidence: Sequence[Evidence]

    def document(self) -> dict[str, Any]:
        """For the record of a rollout: below 16 KiB."""
        return {
            "outcome": self.outcome, "reason": self.reason, "evidence": [item.document() for item in self.evidence]
        }  # fmt: skip


def judge(statistics: Statistics, *, step: int, dwell_passed: bool) -> Verdict:
    """What follows from what is known now.

    Rolled back: for one limit it is shown that the candidate is beyond it. Next: the step has stood for its time, the
    candidate answered LEAST_REQUESTS in it, and it is shown to be within every limit. Where that is not shown it goes
    on as well if nothing speaks against it: no estimate is beyond its limit, and so many requests were answered that
    one beyond it would have shown something (`needed`). A metric for which no label has come yet holds nobody up. In
    the last step no request is live's, and nothing is compared: it stands for its time and its requests.

    Args:
        statistics: Everything counted since the rollout began.
        step: Index of the step that is served.
        dwell_passed: Whether the step has stood for its time.
    """
    found = [evidence(statistics, limit) for limit in statistics.stop_if.limits]
    segments = [evidence(statistics, item.limit, name) for item in found for name in statistics.segments]
    told = [*found, *[item for item in segments if item.outcome == "beyond"][:MOST_TOLD]]
    if beyond := [item for item in told if item.outcome == "beyond"]:
        return Verdict(outcome="rolled back", reason="; ".join(item.words for item in beyond), evidence=told)
    words = "; ".join(item.words for item in found)
    if not dwell_passed:
        return Verdict(outcome="wait", reason=_joined("the step has not stood for its time", words), evidence=told)
    if why := _waits_for(statistics, found, step):
        return Verdict(outcome="wait", reason=_joined(why, words), evidence=told)
    shown = all(item.outcome == "within" for item in found)
    because = "" if shown else "nothing speaks against the candidate"
    return Verdict(outcome="next", reason=_joined(because, words), evidence=told)


def needed(statistics: Statistics, limit: Limit) -> int:
    """Requests of the candidate among which one just beyond the limit has failed one with 95 %: three over the limit
    (the rule of three: Hanley and Lippman-Hand, JAMA 249, 1983). At least LEAST_REQUESTS, at most MOST_NEEDED."""
    match limit.kind:
        case "latency":
            rate = 1 - limit.quantile
        case "metric":
            return LEAST_REQUESTS
        case _:
            _, live = statistics.arrays(limit.name)
            requests, errors = live.sum((0, 2))
            rate = limit.margin or (limit.times - 1) * errors / max(requests, 1)
    return int(min(MOST_NEEDED, max(LEAST_REQUESTS, math.ceil(3 / rate)))) if rate > 0 else LEAST_REQUESTS


def evidence(statistics: Statistics, limit: Limit, segment: str = "") -> Evidence:
    """What is known of a limit.

    Args:
        statistics: Everything counted since the rollout began.
        limit: One of theirs.
        segment: One of theirs; empty for everybody.
    """
    candidate, live = statistics.arrays(limit.name, segment)
    spread = None if limit.is_share else statistics.spread(limit.name, segment)
    against = excess(limit, candidate, live, spread)
    low, high = bounds(statistics.stop_if, limit, against, segment=bool(segment))
    requests = statistics.requests("candidate", limit.name, segment=segment)
    estimate = float(against.estimate)
    if not math.isfinite(float(against.variance)):
        outcome: Literal["beyond", "within", "open", "nothing"] = "open" if requests and live.any() else "nothing"
        if requests and not limit.times:
            outcome = "open"
    else:
        outcome = "beyond" if low > 0 else "within" if high < 0 else "open"
    words = _words(statistics, limit, segment, outcome)
    return Evidence(
        limit=limit, segment=segment, outcome=outcome, words=words,
        excess=estimate if requests else math.nan, low=float(low), high=float(high), requests=requests,
    )  # fmt: skip


def excess(limit: Limit, candidate: Array, live: Array, spread: float | Array | None) -> Contrast:
    """How far the candidate is beyond a limit; shapes as of `contrast`, to which several rollouts may be given at once.

    Args:
        limit: What is asked.
        candidate: Requests and sums.
        live: The same of the live release.
        spread: Variance of single requests' values; None where they are 0 or 1.
    """
    # Milliseconds were multiplied when they were counted: shares are compared one to one.
    times = 1.0 if limit.kind == "latency" else limit.times
    at_least = None if spread is None else np.asarray(spread, dtype=np.float64)
    margin = None if spread is not None else limit.margin
    found = contrast(candidate, live, times=times, spread=at_least, margin=margin)
    worse = -found.estimate if limit.less_is_worse else found.estimate
    return Contrast(estimate=worse - limit.margin, variance=found.variance, freedom=found.freedom)


def bounds(stop_if: StopIf, limit: Limit, against: Contrast, *, segment: bool) -> tuple[Array, Array]:
    """Between what an excess is, at all looks: the lower one with the limit's part of FALSE_ALARMS, the upper one with
    FALSE_CLEARANCES.

    Args:
        stop_if: All limits of the rollout.
        limit: The one that is asked.
        against: Its excess.
        segment: Whether it is that of one segment.
    """
    alarms = FALSE_ALARMS / len(stop_if.limits)
    if stop_if.by:
        alarms /= 2 * MOST_SEGMENTS if segment else 2
    low = against.estimate - against.bound(alarms, limit.scale)
    return low, against.estimate + against.bound(FALSE_CLEARANCES, limit.scale)


def _waits_for(statistics: Statistics, found: Sequence[Evidence], step: int) -> str:
    """What is missing before the next step; empty when nothing is."""
    here = statistics.requests("candidate", step=step)
    if found and here < LEAST_REQUESTS:
        return f"{here} of {LEAST_REQUESTS} requests that the candidate has to answer in a step"
    for item in found:
        name, least = item.limit.name, needed(statistics, item.limit)
        if item.outcome == "within" or (item.outcome == "nothing" and item.limit.kind == "metric"):
            continue
        if item.outcome == "nothing":
            return f"{name} was not measured in both arms yet"
        if item.requests < least:
            return f"{item.requests:,} of {least:,} requests for {name}"
        if item.excess > 0:
            return f"{name} looks as if it were beyond its limit, which is not shown yet"
    return ""


def _joined(first: str, words: str) -> str:
    return ": ".join(filter(None, [first, words]))


def _words(statistics: Statistics, limit: Limit, segment: str, outcome: str) -> str:
    """The evidence as people read it, with intervals that hold at all looks."""
    where = f" of {statistics.stop_if.by} {segment}" if segment else ""
    if outcome == "nothing":
        return f"{limit.name}{where}: not measured yet"
    candidate, live = statistics.arrays(limit.name, segment)
    spread = None if limit.is_share else np.asarray(statistics.spread(limit.name, segment))
    mine = _interval(limit, candidate, live, spread)
    theirs = "" if not limit.times else f" against {_interval(limit, live, candidate, spread)}"
    if limit.kind == "latency":
        at = statistics.thresholds[limit.name]
        now, before = (statistics.latency(arm, limit.quantile) for arm in ("candidate", "live"))
        mine = f"{_ms(now)} against {_ms(before)}, {mine} above {_ms(limit.times * at)}"
        theirs = f"{theirs} above {_ms(at)}"
    said = {"beyond": "beyond", "within": "within"}.get(outcome, "not shown to be within or beyond")
    # Several people may share a slot: there are at least so many.
    people = f"at least {statistics.people(limit.name, segment):,} people in both"
    after = f"{int(candidate[:, 0].sum()):,} requests, of {people}"
    return f"{limit.name}{where} {mine}{theirs} after {after}: {said} {limit.text}"


def _interval(limit: Limit, arm: Array, other: Array, spread: Array | None) -> str:
    """The mean of one arm and between what it is."""
    found = contrast(arm, other, times=0, spread=spread, margin=0.0 if spread is None else None)
    mean, wide = float(found.estimate), float(found.bound(SHOWN / 2, limit.scale))
    if not limit.is_share:
        between = f" [{number(mean - wide)}, {number(mean + wide)}]" if math.isfinite(wide) else ""
        return f"{number(mean)}{between}"
    if not math.isfinite(wide):
        return f"{_percent(mean)} %"
    return f"{_percent(mean)} % [{_percent(max(0.0, mean - wide))}, {_percent(min(1.0, mean + wide))}]"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f}" if percent >= 0.95 or percent == 0 else f"{percent:.2g}"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"

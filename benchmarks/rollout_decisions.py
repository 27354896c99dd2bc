"""How often the decision of a rollout is wrong, and how long it takes: simulated rollouts, looked at every minute.

`python benchmarks/rollout_decisions.py [--write]`; seeded, one core, minutes. The bounds are those of
registry/decision; the control is a t-test of the same rows that knows neither people nor looks.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from report import PAGE, machine, write
from scipy import stats

from train_and_ship.registry.decision.judgement import LEAST_REQUESTS, MOST_NEEDED, bounds, excess
from train_and_ship.registry.decision.limits import Limit, StopIf

Array = NDArray[np.float64]

PEOPLE, PER_MINUTE = 2_000, 0.5
"""People of a rollout, and what one of them asks in a minute on average; exponential."""
DWELL, DEADLINE = 20, 120
"""Minutes: of a step, and of the whole."""
ERRORS, SLOW = 0.004, 0.01
"""Shares of live's requests; a person's own are these times a number of mean 1 and variance 3 (1 for slow),
and what the candidate adds has one of its own."""
CHUNK = 50
SEGMENT = 0.1
"""Share of people in it."""
MEASURES = {"errors": 1, "latency": 2}

SETTING = (
    f"{PEOPLE:,} people who send {PER_MINUTE} requests a minute on average (exponential), {ERRORS:.1%} of them failing "
    "(per person: gamma, variance 3; what the candidate adds: variance 1, mostly for a few people: 3), steps of 5, 25, "
    "50 and 100 %, where nothing else is said, of "
    f"{DWELL} minutes each; undecided after {DEADLINE // 60} hours, which is rolled back then. "
    "`stop_if: {errors: +0.5%, p99_ms: 1.3x}`, where nothing else is said; looked at every minute. Requests: of both "
    "arms until it was rolled back, median. Exposed: share of people who were given the candidate by the decision, "
    "mean. Control: a t-test of the same rows at 5 %, looked at every minute."
)


@dataclass(frozen=True)
class Scenario:
    """A candidate."""

    name: str
    stop_if: StopIf
    errors: float = ERRORS
    """Of the candidate's requests."""
    slower: float = 1.0
    """Its latency divided by live's."""
    only_segment: bool = False
    """Whether it is like that for one person in ten, and like live for the others."""
    uneven: float = 1.0
    """Variance over people of what the candidate adds to the errors, whose mean is 1: 3 is mostly a few of them."""
    streams: int = 200
    shares: tuple[float, ...] = (0.05, 0.25, 0.5)
    """Steps before the last, at which nothing is left to compare with."""

    @property
    def limits(self) -> tuple[Limit, ...]:
        return self.stop_if.limits

    @property
    def slow(self) -> float:
        """Share of the candidate's requests above the limit's multiple of live's 99th percentile: latencies are
        log-normal, sigma 0.5."""
        times = next((limit.times for limit in self.limits if limit.kind == "latency"), 1.3)
        return float(stats.norm.sf(stats.norm.isf(SLOW) - math.log(self.slower / times) / 0.5))


USUAL = StopIf.parse({"errors": "+0.5%", "p99_ms": "1.3x"})
NONE_WORSE = StopIf.parse({"errors": "+0%"})
NARROW = StopIf.parse({"errors": "+0.05%"})
BY_SEGMENT = StopIf.parse({"errors": "+0.5%", "p99_ms": "1.3x", "by": "country"})
SCENARIOS = (
    Scenario("equal", USUAL, streams=2000),
    Scenario("just at both limits", USUAL, ERRORS + 0.005, 1.3, streams=2000),
    Scenario(
        "just at both limits, 1, 5, 25 and 100 %", USUAL, ERRORS + 0.005, 1.3, streams=1000, shares=(0.01, 0.05, 0.25)
    ),
    Scenario("equal, `errors: +0%`", NONE_WORSE, streams=2000),
    Scenario("1 point worse", USUAL, ERRORS + 0.01),
    Scenario("2 points worse", USUAL, ERRORS + 0.02),
    Scenario("5 points worse", USUAL, ERRORS + 0.05),
    Scenario("5 points worse, 1, 5, 25 and 100 %", USUAL, ERRORS + 0.05, shares=(0.01, 0.05, 0.25)),
    Scenario("5 points worse, mostly for a few people", USUAL, ERRORS + 0.05, uneven=3),
    Scenario("1.5 times as slow", USUAL, slower=1.5),
    Scenario("twice as slow", USUAL, slower=2.0),
    Scenario("fails one in 1,000 more", USUAL, ERRORS + 0.001),
    Scenario("fails one in 1,000 more, `errors: +0.05%`", NARROW, ERRORS + 0.001),
    Scenario("5 points worse for one in ten", USUAL, ERRORS + 0.05, only_segment=True),
    Scenario("5 points worse for one in ten, `by`", BY_SEGMENT, ERRORS + 0.05, only_segment=True),
)


@dataclass
class Outcomes:
    """Of the streams of a scenario, in no order."""

    rolled_back: list[bool] = field(default_factory=list)
    promoted: list[bool] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    """Of both arms until the decision."""
    exposed: list[float] = field(default_factory=list)
    """Share of people whom the candidate had answered, or would have, by then; all when promoted."""
    alarmed: list[bool] = field(default_factory=list)
    """Whether the control would have rolled back at any look."""


class Streams:
    """Some rollouts side by side. `sums` has shape (streams, steps, arms, what, people): candidate and live; requests,
    failed and slow ones."""

    def __init__(self, scenario: Scenario, count: int, random: np.random.Generator) -> None:
        size = (count, PEOPLE)
        self.rates = random.gamma(1, PER_MINUTE, size)
        own = random.gamma(1 / 3, 3, size), random.gamma(1, 1, size)
        added = random.gamma(1 / scenario.uneven, scenario.uneven, size)
        self.place = random.random(size)
        bad = np.arange(PEOPLE) < (SEGMENT if scenario.only_segment else 1) * PEOPLE
        failed = ERRORS * own[0] + np.where(bad, (scenario.errors - ERRORS) * added, 0)
        self.live_p = np.clip(ERRORS * own[0], 0, 0.45), np.clip(SLOW * own[1], 0, 0.45)
        self.candidate_p = np.clip(failed, 0, 0.45), np.clip(scenario.slow * own[1], 0, 0.45)
        self.sums = np.zeros((count, len(scenario.shares), 2, 3, PEOPLE), dtype=np.float32)
        self.shares = np.array(scenario.shares)
        self.step = np.zeros(count, dtype=int)
        self.since = np.zeros(count, dtype=int)
        self.alarmed = np.zeros(count, dtype=bool)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Goes on with some of them."""
        for name in ("rates", "place", "sums", "step", "since", "alarmed"):
            setattr(self, name, getattr(self, name)[chosen])
        self.live_p = self.live_p[0][chosen], self.live_p[1][chosen]
        self.candidate_p = self.candidate_p[0][chosen], self.candidate_p[1][chosen]

    def minute(self, random: np.random.Generator) -> None:
        """Requests of a minute."""
        candidate = self.place < self.shares[self.step][:, None]
        failing, slow = (np.where(candidate, *both) for both in zip(self.candidate_p, self.live_p, strict=True))
        asked = random.poisson(self.rates)
        # Few requests are anything but good: only those of people who asked are drawn.
        some = np.flatnonzero(asked)
        number, failed_p, slow_p = (of.ravel()[some] for of in (asked, failing, slow))
        failed = random.binomial(number, failed_p)
        late = random.binomial(number - failed, slow_p / (1 - failed_p))
        every = np.zeros((3, asked.size), dtype=np.float32)
        every[:, some] = number, failed, late
        every = every.reshape(3, *asked.shape)
        rows = np.arange(len(self.step))
        for arm, chosen in enumerate((candidate, ~candidate)):
            for what in range(3):
                self.sums[rows, self.step, arm, what] += every[what] * chosen
        self.since += 1


def simulate(scenario: Scenario, random: np.random.Generator) -> Outcomes:
    """All streams of a scenario."""
    found = Outcomes()
    for first in range(0, scenario.streams, CHUNK):
        streams = Streams(scenario, min(CHUNK, scenario.streams - first), random)
        for minute in range(1, DEADLINE + 1):
            streams.minute(random)
            beyond, passes = look(scenario, streams)
            streams.alarmed |= control(scenario, streams)
            moves = ~beyond & passes & (streams.since >= DWELL)
            promoted = moves & (streams.step == len(scenario.shares) - 1)
            ended = beyond | promoted | (minute == DEADLINE)
            for at in np.flatnonzero(ended):
                found.rolled_back.append(bool(beyond[at]))
                found.promoted.append(bool(promoted[at]))
                found.requests.append(float(streams.sums[at, :, :, 0].sum()))
                found.exposed.append(1.0 if promoted[at] else scenario.shares[streams.step[at]])
                found.alarmed.append(bool(streams.alarmed[at]))
            streams.step[moves & ~promoted] += 1
            streams.since[moves] = 0
            if ended.any():
                streams.keep(~ended)
                if not len(streams.step):
                    break
    return found


def look(scenario: Scenario, streams: Streams) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which are shown to be beyond a limit, and which may go on once their step has stood: the rules of `judge`."""
    reached = int(streams.step.max()) + 1
    sums = streams.sums[:, :reached]
    here = streams.sums[np.arange(len(streams.step)), streams.step, 0, 0].sum(-1)
    beyond, passes = np.zeros(len(here), dtype=bool), here >= LEAST_REQUESTS
    cut = int(SEGMENT * PEOPLE)
    for limit in scenario.limits:
        pick = [0, MEASURES[limit.kind]]
        arms = sums[:, :, 0][:, :, pick], sums[:, :, 1][:, :, pick]
        against = excess(limit, *arms, None)
        low, high = bounds(scenario.stop_if, limit, against, segment=False)
        beyond |= low > 0
        rate = limit.margin if limit.kind == "errors" else 1 - limit.quantile
        needed = min(MOST_NEEDED, max(LEAST_REQUESTS, math.ceil(3 / rate))) if rate else LEAST_REQUESTS
        passes &= (high < 0) | ((arms[0][:, :, 0].sum((1, 2)) >= needed) & (against.estimate <= 0))
        for part in (slice(0, cut), slice(cut, None)) if scenario.stop_if.by else ():
            against = excess(limit, arms[0][..., part], arms[1][..., part], None)
            low, _ = bounds(scenario.stop_if, limit, against, segment=True)
            beyond |= low > 0
    return beyond, passes


def control(scenario: Scenario, streams: Streams) -> NDArray[np.bool_]:
    """A one-sided t-test at 5 % for each limit, of all rows as if they were independent and this the only look."""
    totals = streams.sums.sum((1, 4), dtype=np.float64)
    alarmed = np.zeros(len(totals), dtype=bool)
    for limit in scenario.limits:
        n = np.maximum(totals[:, :, 0], 1)
        p = totals[:, :, MEASURES[limit.kind]] / n
        error = np.sqrt((p * (1 - p) / n).sum(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            alarmed |= (p[:, 0] - p[:, 1] - limit.margin) / error > stats.norm.isf(0.05)
    return alarmed


def share(found: list[bool]) -> str:
    """With its exact 95 % interval (Clopper and Pearson)."""
    interval = stats.binomtest(sum(found), len(found)).proportion_ci()
    return f"{sum(found) / len(found):.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def row(scenario: Scenario, found: Outcomes) -> str:
    """Of the table."""
    times = [asked for asked, back in zip(found.requests, found.rolled_back, strict=True) if back]
    median = f"{np.median(times):,.0f}" if len(times) >= len(found.requests) / 20 else "–"
    undecided = 1 - np.mean(found.rolled_back) - np.mean(found.promoted)
    return " | ".join(
        [
            f"| {scenario.name}", f"{scenario.streams:,}", share(found.rolled_back), f"{np.mean(found.promoted):.1%}",
            f"{undecided:.1%}", median, f"{np.mean(found.exposed):.1%}", f"{share(found.alarmed)} |",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--streams", type=int, help="at most so many of each scenario")
    given = parser.parse_args()
    lines, began = [], time.process_time()
    for number, scenario in enumerate(SCENARIOS):
        chosen = replace(scenario, streams=min(scenario.streams, given.streams or scenario.streams))
        lines.append(row(chosen, simulate(chosen, np.random.default_rng([2027, number]))))
        print(lines[-1], f"{time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    seconds = time.process_time() - began
    text = f"""## Decisions of rollouts, simulated

{machine("numpy", "scipy")}
Measured with `python benchmarks/rollout_decisions.py --write`, {seconds:.0f} s of CPU time. {SETTING}

| candidate | rollouts | rolled back | promoted | undecided | requests | exposed | control rolls back |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}"""
    if given.write:
        write(PAGE, "rollout_decisions", text)
    else:
        print(text)


if __name__ == "__main__":
    main()

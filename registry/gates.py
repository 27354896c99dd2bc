"""What is asked of a candidate versus the live release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from torchworker.contract import (
    RehearseResult,
    Verdict,
    fewest_groups,
)
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.live_score import LiveScore
from train_and_ship.registry.text import Cell, Table, interval_text, number, passed_or_failed
from train_and_ship.registry.verdicts import verdict_table

MOST_TOLD = 10
"""Checks of a format in a refusal, of those that failed and of those that passed: whoever publishes says how many."""


def worst(job: Job, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each quality metric at its worst over the formats: any of them may be the one that serves.

    Args:
        job: Says which direction of a metric is better.
        metrics: Format to metric to value.
    """
    found: dict[str, float] = {}
    for values in metrics.values():
        for name, value in values.items():
            pick = min if job.direction(name) == "higher" else max
            found[name] = pick(found.get(name, value), value)
    return found


@dataclass(frozen=True, kw_only=True)
class VersusLive:
    """A candidate's metrics and those of the live release, measured by one process on the same samples."""

    live: str
    """The live release's id."""
    candidate: Mapping[str, float]
    theirs: Mapping[str, float]
    """The same of the live release."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric to what its improvement may be; positive is better."""
    groups: int = 0
    """How many groups were drawn anew for the intervals; 0 where single samples were."""
    problem: str = ""
    """Why the live release could not be measured."""

    @classmethod
    def of(cls, job: Job, result: RehearseResult, live: str) -> Self:
        """What a rehearsal measured, each metric at its worst over the formats. live: the live release's id."""
        return cls(
            live=live,
            candidate=worst(job, result.candidate),
            theirs=worst(job, result.live),
            intervals={name: (item.low, item.high) for name, item in result.intervals.items()},
            groups=result.groups,
            problem=result.live_problem,
        )

    def improvement(self, job: Job, metric: str) -> float | None:
        """How much better the candidate is, positive when better whatever the metric's direction; None when it was not
        measured on both."""
        mine, theirs = self.candidate.get(metric), self.theirs.get(metric)
        if mine is None or theirs is None:
            return None
        return mine - theirs if job.direction(metric) == "higher" else theirs - mine


def live_score(job: Job, result: RehearseResult) -> LiveScore:
    """How the live release does on the samples of a rehearsal, to be held against its own record."""
    return LiveScore(
        samples=result.samples,
        # Its record is of its own classes.
        scored={**worst(job, result.live), **worst(job, result.live_own)},
        spread=result.live_spread,
        constant=result.constant,
        widths={name: item.high - item.low for name, item in result.intervals.items()},
    )


class Asked(StrEnum):
    """What in a job asks for a comparison."""

    VS_LIVE = "vs_live"
    """A gate on a metric: the difference as it was measured."""
    POLICY = "release.policy"
    """The lower end of the interval, which counts what other samples would have said."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One thing that was asked of the difference between two releases."""

    asked: Asked
    metric: str
    candidate: float | None
    live: float | None
    improvement: float | None
    """None when it could not be measured, which is a failure."""
    interval: tuple[float, float] | None
    needs: str
    """The condition in words."""
    passed: bool
    why: str = ""
    """What is wrong, when something is."""


def comparison_table(compared: Sequence[Comparison]) -> Table:
    """A row for each thing that was asked of the difference."""
    header = ("metric", "candidate", "live", "improvement", "interval", "needs", "verdict")
    rows = [
        (
            item.metric, number(item.candidate), number(item.live),
            "cannot be compared" if item.improvement is None else f"{item.improvement:+.4g}",
            interval_text(item.interval), item.needs, passed_or_failed(item.passed),
        )
        for item in compared
    ]  # fmt: skip
    return Table(header=header, rows=rows)


def compare(job: Job, versus: VersusLive, *, policy: bool = True) -> list[Comparison]:
    """Everything that the job asks of the difference: `vs_live` of the number itself, `release.policy` of its interval.

    Args:
        job: Says what is asked.
        versus: What was measured. What was not has failed.
        policy: False where nobody has the samples, only recorded numbers.
    """
    asked = [_measured(job, versus, name, gate.vs_live) for name, gate in job.gates.items() if gate.vs_live is not None]
    if policy and job.release.policy in ("better", "not_worse"):
        asked.append(_certain(job, versus))
    return asked


def require_rehearsed(candidate: str, result: RehearseResult, otherwise: str) -> None:
    """Refuse a release that is not what was validated, as it came back from the bucket.

    Args:
        candidate: Which release of which model it is, in words.
        result: What its rehearsal found.
        otherwise: What has not been done, in words.

    Raises:
        GateError: A check failed, or there was none; it carries the table of the first ones of each format.
    """
    if not result.passed:
        shown: list[Verdict] = []
        told: Counter[tuple[str, bool]] = Counter()
        for item in result.verdicts:
            told[item.format, item.passed] += 1
            if told[item.format, item.passed] <= MOST_TOLD:
                shown.append(item)
        names = [f"{item.format} ({item.case})" for item in shown if not item.passed]
        more = sum(not item.passed for item in result.verdicts) - len(names)
        failed = ", ".join(names) + (f" and {more} more" if more else "")
        said = f"{candidate}, as it came back from the bucket, fails: {failed or 'nothing was checked'}. {otherwise}"
        raise GateError(said, verdict_table(shown).text())


def require_good_enough(job: Job, versus: VersusLive, *, policy: bool = True) -> None:
    """Hold a candidate against the live release; the arguments are those of `compare`.

    Raises:
        GateError: Anything that is asked fails. It carries the table.
    """
    compared = compare(job, versus, policy=policy)
    if not compared:
        return
    if versus.problem:
        gates = [f"vs_live ({item.metric})" for item in compared if item.asked is Asked.VS_LIVE]
        gates += [f"release.policy: {job.release.policy}" for item in compared if item.asked is Asked.POLICY]
        raise GateError(
            f"{job.name}: the candidate cannot be compared with the live release {versus.live}: {versus.problem}. The "
            f"live release stays. To replace it nevertheless, take {' and '.join(gates)} out of the job file for one "
            "run; the other gates are still asked"
        )
    failed = [item for item in compared if not item.passed]
    if failed:
        worse = any(item.asked is Asked.VS_LIVE for item in failed)
        how = f"is worse than the live release {versus.live}" if worse else _not_shown(job, versus.live)
        raise GateError(
            f"{job.name}: the candidate {how}: {'; '.join(item.why for item in failed)}. The live release stays.",
            comparison_table(compared).text(),
        )


def require_not_slower(
    job: Job, candidate: Mapping[str, float], live: Mapping[str, float], name: str, problem: str = ""
) -> None:
    """Hold a candidate's times, sizes and memory against the live release's by the job's `times_live` gates.

    Args:
        job: Says what is asked.
        candidate: Gate to value, measured by turns with those of the live release. What was not measured has failed.
        live: The same of the live release.
        name: The live release's id.
        problem: Why they could not be measured; empty when they were.

    Raises:
        GateError: Any gate fails. It carries the table.
    """
    limits = {gate: limit.times_live for gate, limit in job.gates.items() if limit.times_live is not None}
    rows: list[Sequence[Cell]] = []
    failed = []
    for gate, limit in limits.items():
        mine, theirs = candidate.get(gate), live.get(gate)
        passed, ratio = False, "cannot be compared"
        if mine is None or theirs is None or problem:
            failed.append(f"{gate}: {problem or 'not measured'}")
        else:
            passed, ratio = mine <= limit * theirs, number(mine / theirs) if theirs else "–"
            if not passed:
                failed.append(f"{gate} {number(mine)} against {number(theirs)}")
        rows.append((gate, number(mine), number(theirs), ratio, f"<= {limit:g}", passed_or_failed(passed)))
    if failed:
        header = ("gate", "candidate", f"live {name}", "ratio", "times_live", "verdict")
        raise GateError(
            f"{job.name}: the candidate is slower or larger than the live release {name} allows: {'; '.join(failed)}. "
            f"The live release stays. To replace it nevertheless, take times_live ({', '.join(limits)}) out of the job "
            "file for one run",
            Table(header=header, rows=rows).text(),
        )


def _not_shown(job: Job, live: str) -> str:
    word = "better than" if job.release.policy == "better" else "as good as"
    return f"is not shown to be {word} the live release {live}"


def _measured(job: Job, versus: VersusLive, metric: str, limit: float) -> Comparison:
    gain = versus.improvement(job, metric)
    passed = gain is not None and gain >= limit
    return _comparison(job, versus, metric, Asked.VS_LIVE, needs=f"vs_live >= {limit:g}", passed=passed)


def _certain(job: Job, versus: VersusLive) -> Comparison:
    release, metric = job.release, job.decisive_metric
    assert metric is not None, "the job was validated"
    interval, better = versus.intervals.get(metric), release.policy == "better"
    limit = release.margin if better else -release.margin
    needs = f"{release.confidence:.0%} sure {'>' if better else '>='} {limit:g}"
    if interval is None:
        why = f"{metric}: there is no interval, because {no_interval(job, versus.groups)}"
        return _comparison(job, versus, metric, Asked.POLICY, needs=needs, passed=False, why=why)
    passed = interval[0] > limit if better else interval[0] >= limit
    over = f" over {versus.groups} groups" if versus.groups else ""
    more = (
        f"{release.confidence:.0%} interval{over} {interval_text(interval)}; release.policy: {release.policy} needs it "
        f"{'above' if better else 'at or above'} {limit:g}"
    )
    return _comparison(job, versus, metric, Asked.POLICY, needs=needs, passed=passed, more=more)


def no_interval(job: Job, groups: int) -> str:
    """Why an improvement has no interval. groups: of `RehearseResult`."""
    sure, least = f"{job.release.confidence:.0%}", fewest_groups(job.release.confidence)
    if 0 < groups < least:
        return (
            f"{groups} {'group is' if groups == 1 else 'groups are'} too few to be {sure} sure, which takes {least}: "
            "validate on more groups, or lower release.confidence"
        )
    return "the metric cannot be computed on drawn samples"


def how_drawn(job: Job, groups: int) -> str:
    """What an interval of the improvement is over, in words. groups: of `RehearseResult`."""
    if not groups:
        return "paired bootstrap over samples, as if each were independent of the others"
    drawn = f"paired bootstrap over {groups:,} groups of samples (data.group)"
    few = groups < fewest_groups(job.release.confidence)
    return f"{drawn}: there is none, because {no_interval(job, groups)}" if few else drawn


def _comparison(
    job: Job, versus: VersusLive, metric: str, asked: Asked, *, needs: str, passed: bool, why: str = "", more: str = ""
) -> Comparison:
    """why: what is wrong, where the numbers do not tell; more: what there is to say beside them."""
    mine, theirs, gain = versus.candidate.get(metric), versus.theirs.get(metric), versus.improvement(job, metric)
    if gain is None:
        why = f"{metric}: not measured on {'the live release' if mine is not None else 'the candidate'}"
    elif not why:
        why = f"{metric} {number(mine)} against {number(theirs)}" + (
            f", improvement {gain:+.4g}, {more}" if more else ""
        )
    return Comparison(
        asked=asked, metric=metric, candidate=mine, live=theirs, improvement=gain,
        interval=versus.intervals.get(metric), needs=needs, passed=passed,
        why="" if passed else why,
    )  # fmt: skip

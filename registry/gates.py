"""Verdicts as people read them, and what is asked of a candidate beside the live release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchworker.contract import Verdict
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.text import number, text_table


def worst(job: Job, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each quality metric at its worst over the formats: any of them may be the one that serves.

    metrics: format to metric to value.
    """
    found: dict[str, float] = {}
    for values in metrics.values():
        for name, value in values.items():
            pick = min if job.direction(name) == "higher" else max
            found[name] = pick(found.get(name, value), value)
    return found


def improvement(job: Job, metric: str, candidate: float, live: float) -> float:
    """How much better the candidate is, positive when better whatever the metric's direction."""
    return candidate - live if job.direction(metric) == "higher" else live - candidate


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A candidate's metrics beside those of the live release, measured by one process on the same samples."""

    live: str
    """The live release's id."""
    candidate: Mapping[str, float]
    theirs: Mapping[str, float]
    """The same of the live release."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric to what its improvement may be; positive is better."""
    problem: str = ""
    """Why the live release could not be measured."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One thing that was asked of the difference between two releases."""

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

    def row(self) -> tuple[str, ...]:
        """For a table under COMPARED."""
        gain = "cannot be compared" if self.improvement is None else f"{self.improvement:+.4g}"
        outcome = "passed" if self.passed else "FAILED"
        span = interval_text(self.interval)
        return (self.metric, number(self.candidate), number(self.live), gain, span, self.needs, outcome)


COMPARED = ("metric", "candidate", "live", "improvement", "interval", "needs", "verdict")


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.4g} to {interval[1]:+.4g}"


def compare(job: Job, beside: Beside, *, policy: bool = True) -> list[Comparison]:
    """Everything that the job asks of the difference: `vs_live` of the number itself, `release.policy` of its interval.

    policy: False where nobody has the samples, only recorded numbers. What was not measured has failed.
    """
    asked = [_measured(job, beside, name, gate.vs_live) for name, gate in job.gates.items() if gate.vs_live is not None]
    if policy and job.release.policy in ("better", "not_worse"):
        asked.append(_certain(job, beside))
    return asked


def require_good_enough(job: Job, beside: Beside, *, policy: bool = True) -> None:
    """Hold a candidate against the live release. Raises GateError with a table when anything that is asked fails."""
    compared = compare(job, beside, policy=policy)
    if not compared:
        return
    if beside.problem:
        asked = [f"vs_live ({item.metric})" for item in compared if item.needs.startswith("vs_live")]
        asked += [f"release.policy: {job.release.policy}"] if len(asked) < len(compared) else []
        raise GateError(
            f"{job.name}: the candidate cannot be held against the live release {beside.live}: {beside.problem}. The "
            f"live release stays. If it is to be replaced all the same, ship once without {' and '.join(asked)}: the "
            "other gates still hold"
        )
    failed = [item.why for item in compared if not item.passed]
    if failed:
        said = "worse" if any(item.needs.startswith("vs_live") for item in compared if not item.passed) else "not shown"
        how = f"is worse than the live release {beside.live}" if said == "worse" else _not_shown(job, beside.live)
        raise GateError(
            f"{job.name}: the candidate {how}: {'; '.join(failed)}. The live release stays.",
            text_table(COMPARED, [item.row() for item in compared]),
        )


def require_not_slower(
    job: Job, candidate: Mapping[str, float], live: Mapping[str, float], name: str, problem: str = ""
) -> None:
    """Hold a candidate's times, sizes and memory against the live release's by the job's `times_live` gates.

    candidate, live: measured by turns in one run; name: the live release's id; problem: why they could not be. Raises
    GateError with a table when any gate fails; what was not measured has failed.
    """
    limits = {gate: limit.times_live for gate, limit in job.gates.items() if limit.times_live is not None}
    rows, failed = [], []
    for gate, limit in limits.items():
        mine, theirs = candidate.get(gate), live.get(gate)
        if mine is None or theirs is None or problem:
            failed.append(f"{gate}: {problem or 'not measured'}")
            rows.append((gate, number(mine), number(theirs), "cannot be compared", f"<= {limit:g}", "FAILED"))
            continue
        passed = mine <= limit * theirs
        if not passed:
            failed.append(f"{gate} {number(mine)} against {number(theirs)}")
        ratio = number(mine / theirs) if theirs else "–"
        rows.append((gate, number(mine), number(theirs), ratio, f"<= {limit:g}", "passed" if passed else "FAILED"))
    if failed:
        raise GateError(
            f"{job.name}: the candidate is slower or larger than the live release {name} allows: {'; '.join(failed)}. "
            f"The live release stays. If it is to be replaced all the same, ship once without times_live "
            f"({', '.join(limits)})",
            text_table(("gate", "candidate", f"live {name}", "ratio", "times_live", "verdict"), rows),
        )


def _not_shown(job: Job, live: str) -> str:
    word = "better than" if job.release.policy == "better" else "as good as"
    return f"is not shown to be {word} the live release {live}"


def _measured(job: Job, beside: Beside, metric: str, limit: float) -> Comparison:
    """`vs_live`: the difference as it was measured."""
    mine, theirs = beside.candidate.get(metric), beside.theirs.get(metric)
    gain = None if mine is None or theirs is None else improvement(job, metric, mine, theirs)
    passed = gain is not None and gain >= limit
    if gain is None:
        why = f"{metric}: not measured on {'the live release' if mine is not None else 'the candidate'}"
    else:
        why = f"{metric} {number(mine)} against {number(theirs)}"
    return Comparison(
        metric=metric, candidate=mine, live=theirs, improvement=gain, interval=beside.intervals.get(metric),
        needs=f"vs_live >= {limit:g}", passed=passed, why="" if passed else why,
    )  # fmt: skip


def _certain(job: Job, beside: Beside) -> Comparison:
    """`release.policy`: the lower end of the interval, which counts what other samples would have said."""
    release, metric = job.release, job.decisive_metric
    assert metric is not None, "the job was validated"
    mine, theirs = beside.candidate.get(metric), beside.theirs.get(metric)
    gain = None if mine is None or theirs is None else improvement(job, metric, mine, theirs)
    interval = beside.intervals.get(metric)
    sure = f"{release.confidence:.0%} sure"
    better = release.policy == "better"
    limit = release.margin if better else -release.margin
    needs = f"{sure} {'>' if better else '>='} {limit:g}"
    passed = interval is not None and (interval[0] > limit if better else interval[0] >= limit)
    if gain is None:
        why = f"{metric}: not measured on {'the live release' if mine is not None else 'the candidate'}"
    elif interval is None:
        why = f"{metric}: there is no interval, because the metric cannot be computed on drawn samples"
    else:
        why = (
            f"{metric} {number(mine)} against {number(theirs)}, improvement {gain:+.4g}, "
            f"{release.confidence:.0%} interval {interval_text(interval)}; release.policy: {release.policy} needs it "
            f"{'above' if better else 'at or above'} {limit:g}"
        )
    return Comparison(
        metric=metric, candidate=mine, live=theirs, improvement=gain, interval=interval, needs=needs, passed=passed,
        why="" if passed else why,
    )  # fmt: skip


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Every gate with its numbers and limit, as aligned text."""
    header = ("format", "gate", "case", "measured", "limit", "verdict", "note")
    rows = [(v.format, v.gate, v.case, number(v.measured), v.limit, _outcome(v), v.note) for v in verdicts]
    return text_table(header, rows)


def _outcome(verdict: Verdict) -> str:
    if not verdict.ran:
        return "not run"
    return "passed" if verdict.passed else "FAILED"

"""Verdicts as people read them, and the gates that need the live release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from infra.errors import GateError
from registry.description import Verdict, number
from registry.job import Job


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


def require_not_worse(
    job: Job, candidate: Mapping[str, float], live: Mapping[str, float], name: str, problem: str = ""
) -> None:
    """Hold a candidate against the live release by the job's `vs_live` gates.

    candidate, live: measured by one process on the same samples; name: the live release's id; problem: why the live
    release could not be measured. Raises GateError with a table when any gate fails; what was not measured has failed.
    """
    limits = {metric: gate.vs_live for metric, gate in job.gates.items() if gate.vs_live is not None}
    if not limits:
        return
    if problem:
        raise GateError(
            f"{job.name}: the candidate cannot be held against the live release {name}: {problem}. The live release "
            f"stays. If it is to be replaced all the same, ship once without vs_live ({', '.join(limits)}): the other "
            "gates still hold"
        )
    rows, failed = [], []
    for metric, limit in limits.items():
        if metric not in live or metric not in candidate:
            failed.append(f"{metric}: not measured on {'the live release' if metric in candidate else 'the candidate'}")
            shown = [number(side.get(metric)) for side in (candidate, live)]
            rows.append((metric, *shown, "cannot be compared", f">= {limit:g}", "FAILED"))
            continue
        gain = improvement(job, metric, candidate[metric], live[metric])
        passed = gain >= limit
        if not passed:
            failed.append(f"{metric} {number(candidate[metric])} against {number(live[metric])}")
        outcome = "passed" if passed else "FAILED"
        rows.append((metric, number(candidate[metric]), number(live[metric]), f"{gain:+.4g}", f">= {limit:g}", outcome))
    if failed:
        header = ("metric", "candidate", f"live {name}", "improvement", "vs_live", "verdict")
        raise GateError(
            f"{job.name}: the candidate is worse than the live release {name}: {'; '.join(failed)}. "
            "The live release stays.",
            text_table(header, rows),
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


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Every gate with its numbers and limit, as aligned text."""
    header = ("format", "gate", "case", "measured", "limit", "verdict", "note")
    rows = [(v.format, v.gate, v.case, number(v.measured), v.limit, _outcome(v), v.note) for v in verdicts]
    return text_table(header, rows)


def _outcome(verdict: Verdict) -> str:
    if not verdict.ran:
        return "not run"
    return "passed" if verdict.passed else "FAILED"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)

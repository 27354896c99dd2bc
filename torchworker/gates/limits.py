"""Fixed limits on what was measured: one verdict a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import METRICS, Gate, Verdict


def apply_limits(
    kind: str, measured: Mapping[str, float], gates: Sequence[Gate], samples: int, problems: Mapping[str, str]
) -> list[Verdict]:
    """One verdict a gate. A gate on something that was not measured has failed.

    Args:
        kind: the format.
        measured: metric to value.
        gates: with the smallest or the largest value allowed, or both.
        samples: validation samples that the metrics are of.
        problems: metric to why it could not be measured.
    """
    verdicts = []
    for gate in gates:
        value, case = measured.get(gate.name), f"{samples} samples"
        conditions = [f">= {gate.min:g}"] if gate.min is not None else []
        conditions += [f"<= {gate.max:g}"] if gate.max is not None else []
        limit = " and ".join(conditions)
        if value is None or value != value:
            why = problems.get(gate.name, "could not be measured")
            verdicts.append(not_measured(kind, gate.name, case, limit, why))
            continue
        passed = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        verdicts.append(Verdict(format=kind, gate=gate.name, case=case, measured=value, limit=limit, passed=passed))
    return verdicts


def better(metric: str) -> str:
    """`higher` or `lower`: which direction of a metric is an improvement."""
    return METRICS.get(metric, "lower")


def at_most(kind: str, gate: str, case: str, measured: float | None, limit: float, note: str = "") -> Verdict:
    """The verdict of a gate with an upper limit.

    Args:
        kind: the format.
        gate: which.
        case: what it was measured on.
        measured: None when it could not be measured, which fails, as NaN does.
        limit: largest value allowed.
        note: for the reader.
    """
    passed = measured is not None and measured <= limit
    return Verdict(
        format=kind, gate=gate, case=case, measured=measured, limit=f"<= {limit:g}", passed=passed, note=note
    )


def not_measured(kind: str, gate: str, case: str, limit: str, note: str) -> Verdict:
    """The verdict of a gate on something that could not be measured: failed.

    Args:
        kind: the format.
        gate: which.
        case: what it would have been measured on.
        limit: the condition in words.
        note: why not.
    """
    return Verdict(format=kind, gate=gate, case=case, measured=None, limit=limit, passed=False, note=note)

"""Fixed limits on what was measured: one verdict a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import METRICS, Gate, Verdict


def apply_limits(
    kind: str, measured: Mapping[str, float], gates: Sequence[Gate], samples: int, problems: Mapping[str, str]
) -> list[Verdict]:
    """Fixed limits. A gate on something that was not measured has failed; problems: why it was not, by name."""
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


def not_measured(kind: str, gate: str, case: str, limit: str, note: str) -> Verdict:
    """The verdict of a gate on something that could not be measured: failed."""
    return Verdict(format=kind, gate=gate, case=case, measured=None, limit=limit, passed=False, note=note)

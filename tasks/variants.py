"""Int8 variants that do not hold what they promise leave the release; what remains goes on without them."""

from __future__ import annotations

from dataclasses import replace

from torchworker.contract import INT8_OF, ScoreResult, ValidateResult
from train_and_ship.registry.job.job import Job


def worse_dropped(job: Job, result: ValidateResult, scored: ScoreResult) -> ValidateResult:
    """The result without the int8 variants that lose too much of a metric in user code, or fail its gates."""
    for kind, found in result.int8.items():
        if found.reason or job.export.int8 is None:
            continue
        failed = [f"{item.gate} {item.measured}" for item in scored.verdicts if item.format == kind and not item.passed]
        rivals = [values for other, values in scored.metrics.items() if other not in INT8_OF]
        for metric in job.train.custom_metrics:
            own = [values[metric.label] for values in rivals if metric.label in values]
            mine = scored.metrics[kind].get(metric.label)
            if mine is None or not own:
                failed.append(f"{metric.label} cannot be computed")
            elif _lost(metric.better, mine, own[0]) > job.export.int8.metric_loss:
                failed.append(f"{metric.label} {mine:.4g}, of the model {own[0]:.4g}")
        if failed:
            result = without(result, kind, "; ".join(failed))
    return result


def _lost(better: str, mine: float, own: float) -> float:
    """How much worse: of a metric that should be high its difference, of one that should be low a share of it."""
    return own - mine if better == "higher" else (mine - own) / abs(own) if own else mine


def without(result: ValidateResult, kind: str, reason: str) -> ValidateResult:
    """The result once a variant is dropped: its verdicts and metrics are not the release's."""
    return replace(
        result,
        verdicts=[item for item in result.verdicts if item.format != kind],
        metrics={name: values for name, values in result.metrics.items() if name != kind},
        int8={**result.int8, kind: replace(result.int8[kind], reason=reason)},
    )

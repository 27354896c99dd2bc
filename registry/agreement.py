"""The metrics of the epoch that ships, as training measured them, held against the gates. No store.

Training evaluates the model on all held-out samples, the gates ask each artifact about as many of them as the job says.
The artifacts are proven to be the model; so where both numbers are of the same samples they are one number, and where
the gates see a sample of them they differ by no more than a sample does. If not, one of the two does not measure what
people will get, and nobody can say which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torchworker import situations
from torchworker.contract import INT8_OF, TrainResult, ValidateResult, Verdict
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.text import Table, number, passed_or_failed
from train_and_ship.registry.verdicts import verdict_table

T_999 = 3.883
"""Student's t with 19 degrees of freedom, two-sided 99.9 %: standard errors are of 20 groups of samples."""
ROUNDING = 0.01
"""Part of a metric, or of its limit, that rounding may make, on another device and in other batches."""
FLIPS = 2
"""Samples that may be on the other side of a decision for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One metric, as two processes measured it."""

    metric: str
    format: str
    trained: float
    """At the end of the epoch that ships, on all held-out samples."""
    gated: float
    allowed: float
    """How far they may be apart."""
    sampled: bool
    """Whether the gates saw only some of these samples."""

    @property
    def agrees(self) -> bool:
        """Whether both can be of one model and one set of samples."""
        return abs(self.trained - self.gated) <= self.allowed


def agreements(job: Job, trained: TrainResult, result: ValidateResult) -> list[Agreement]:
    """Every metric of every float format that can be held against the epoch's.

    Of a custom loop there is none: it reports what it likes. Nor where samples are coupled: training asks in batches,
    the gates one by one. Nor of `export.serving`, which may decide otherwise than the model: see `served_otherwise`.
    """
    if job.export.serving is not None:
        return []
    return _agreements(job, trained, result)


def served_otherwise(job: Job, trained: TrainResult, result: ValidateResult) -> str:
    """Metrics of which the gates measured another value of what `export.serving` makes of the model than training of
    the model itself, in words; empty where there are none. It may be meant (another threshold, other units), or be a
    preprocessing that is not that of the training."""
    if job.export.serving is None:
        return ""
    wrong = {item.metric: item for item in _agreements(job, trained, result) if not item.agrees}
    told = [
        f"{item.metric} is {number(item.trained)} of the trained model and {number(item.gated)} of what "
        f"{job.export.serving} makes of it ({item.format})"
        for item in wrong.values()
    ]
    meant = "; if this is not meant, it prepares its inputs otherwise than data.factory, or gives other answers"
    return "; ".join(told) + meant if told else ""


def _agreements(job: Job, trained: TrainResult, result: ValidateResult) -> list[Agreement]:
    if job.train.entrypoint is not None or job.coupled or not trained.history:
        return []
    return list(_compared(_of_epoch(trained), trained.validation_samples, result))


def _of_epoch(trained: TrainResult) -> Mapping[str, float]:
    return {name.removeprefix("validation_"): value for name, value in trained.shipped.items()}


def _compared(epoch: Mapping[str, float], samples: int, result: ValidateResult) -> Iterator[Agreement]:
    sampled = result.validation_samples < samples
    for kind, values in result.metrics.items():
        if kind in INT8_OF:
            # As near as the job allows, which is asked of it elsewhere.
            continue
        errors = result.standard_errors.get(kind, {})
        for name, value in values.items():
            if name not in epoch or (sampled and name not in errors):
                continue
            rounding = ROUNDING * max(abs(value), abs(epoch[name])) + FLIPS / result.validation_samples
            chance = T_999 * errors[name] if sampled else 0.0
            yield Agreement(
                metric=name, format=kind, trained=epoch[name], gated=value, allowed=rounding + chance, sampled=sampled
            )


def require_agreement(job: Job, trained: TrainResult, result: ValidateResult) -> None:
    """Raises GateError when the gates measured what the epoch that ships did not."""
    compared = agreements(job, trained, result)
    wrong = [item for item in compared if not item.agrees]
    if not wrong:
        return
    first = wrong[0]
    epoch = int(trained.shipped["epoch"])
    of = f"{result.validation_samples:,} of these" if first.sampled else "the same"
    raise GateError(
        f"{job.name}: {first.metric} is {number(first.trained)} at the end of epoch {epoch} on "
        f"{trained.validation_samples:,} validation samples (training), and {number(first.gated)} on {of} at the gates "
        f"({first.format}); {situations.OTHER_NUMBERS} {number(first.allowed)}. The artifact gives the model's "
        "answers, so the two were not measured on the same thing: look for validation data that depends on who reads "
        "it or on when, and for a metric that depends on the order or the number of the samples it is given. Nothing "
        "was registered or promoted",
        agreement_table(compared).text(),
    )


def require_may_pass(job: Job, trained: TrainResult) -> None:
    """Refuse a trained model that no artifact of it can pass the job's gates with; passing is for artifacts alone.

    Only what is known for certain refuses: limits on a metric that the built-in loop has measured in the epoch that
    ships, on the samples that the gate has too.

    Raises:
        GateError: A gate will fail. It carries the table.
    """
    samples, entrypoint = trained.validation_samples, job.train.entrypoint
    # Coupled samples have other answers one at a time, and what serves may decide otherwise than the model.
    if entrypoint is not None or job.coupled or job.export.serving is not None:
        return
    if not trained.history or samples > job.export.validation_samples:
        return
    shipped, failed = trained.shipped, []
    for name, gate in job.gates.items():
        value = shipped.get(f"validation_{name}")
        if value is None or value != value:
            continue
        flips = FLIPS / max(1, samples) if name == "accuracy" else 0.0
        low = gate.min is not None and value < gate.min - ROUNDING * abs(gate.min) - flips
        high = gate.max is not None and value > gate.max + ROUNDING * abs(gate.max) + flips
        if low or high:
            limit = f">= {gate.min:g}" if low else f"<= {gate.max:g}"
            failed.append(
                Verdict(
                    format="the trained model", gate=name, case=f"{samples} samples", measured=value, limit=limit,
                    passed=False,
                )
            )  # fmt: skip
    if failed:
        told = ", ".join(f"{item.gate} {number(item.measured)}, expected {item.limit}" for item in failed)
        raise GateError(
            f"{job.name}: {len(failed)} of {len(job.gates)} {situations.CANNOT_PASS}, for the trained model "
            f"itself: {told}. Nothing was exported, registered or promoted.",
            verdict_table(failed).text(),
        )


def agreement_table(compared: Sequence[Agreement]) -> Table:
    """A row for each number that was measured twice."""
    header = ("format", "metric", "training", "gates", "allowed difference", "verdict")
    rows = [
        (
            item.format, item.metric, number(item.trained), number(item.gated), number(item.allowed),
            passed_or_failed(item.agrees),
        )
        for item in compared
    ]  # fmt: skip
    return Table(header=header, rows=rows)

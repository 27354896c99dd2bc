"""Metrics of the user's own, from each artifact's own outputs: the one check of artifacts that needs the user's code.

It runs after the clean room has shown that the artifacts stand alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchworker.contract import (
    EVENTS,
    PLACES,
    VALIDATION,
    CustomMetric,
    Interval,
    ScoreRequest,
    ScoreResult,
    TensorSpec,
    Verdict,
)
from torchworker.gates.bootstrap import interval_of
from torchworker.gates.limits import apply_limits
from torchworker.parity.reference import GROUP, validation_batches
from torchworker.process.events import EventLog
from torchworker.process.failure import UserError, describe
from torchworker.process.fork import CORES, ChildDiedError, can_fork
from torchworker.project.metrics import joined, standard_error
from torchworker.project.signature import samples_of_a_call
from torchworker.project.user_code import call_metric, enter
from torchworker.runtimes.load import load_artifact, load_libraries, require_hashes

TOLD_SECONDS = 1.0
"""Between two words of one process on how far it is."""
Outputs = dict[str, Tensor]
"""Format to the first output on all samples, [samples, …]."""


def score(request: ScoreRequest) -> ScoreResult:
    """Each custom metric of each format over the whole validation set, and its gates.

    A metric that fails, or gives no number, fails its gates. A live release that cannot be scored is no failure: the
    result says why.
    """
    enter(request.project)
    require_hashes(Path(request.folder), request.hashes)
    load_libraries(Path(request.folder) / library for library in request.libraries)
    validation = load_file(Path(request.folder) / VALIDATION)
    order = _as_in_the_dataset(validation)
    target = validation["target"][order]
    metrics: dict[str, dict[str, float]] = {}
    verdicts: list[Verdict] = []
    errors: dict[str, dict[str, float]] = {}
    mine = _outputs(request.folder, request.formats, request.inputs, validation, order, request)
    for kind, outputs in mine.items():
        measured: dict[str, float] = {}
        problems: dict[str, str] = {}
        for metric in request.project.custom_metrics:
            try:
                measured[metric.name] = call_metric(metric, outputs, target, request.project)
            except UserError as mistake:
                problems[metric.name] = str(mistake)
        metrics[kind] = measured
        if request.errors:
            errors[kind] = {
                metric.name: error
                for metric in request.project.custom_metrics
                if math.isfinite(error := _standard_error(metric, outputs, target, request))
            }
        verdicts += apply_limits(kind, measured, request.gates, len(target), problems)
    if request.live is None:
        return ScoreResult(metrics=metrics, verdicts=verdicts, standard_errors=errors)
    try:
        require_hashes(Path(request.live.folder), request.live.hashes)
        asked = load_file(request.live_validation) if request.live_validation else validation
        theirs = _outputs(request.live.folder, request.live.formats, request.live.inputs, asked, order, request)
        live = {
            kind: {
                metric.name: call_metric(metric, outputs, target, request.project)
                for metric in request.project.custom_metrics
            }
            for kind, outputs in theirs.items()
        }
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else describe(error)
        return ScoreResult(metrics=metrics, verdicts=verdicts, standard_errors=errors, live_problem=said)
    intervals: dict[str, Interval] = {}
    if request.resampling is not None:
        groups = validation[GROUP][order] if GROUP in validation else None
        for metric in request.project.custom_metrics:
            pair = [_worst(metric, measured) for measured in (metrics, live)]
            if None not in pair:
                both = (mine[str(pair[0])], theirs[str(pair[1])])
                intervals |= _interval(metric, both, target, groups, request)
    return ScoreResult(metrics=metrics, verdicts=verdicts, standard_errors=errors, live=live, intervals=intervals)


def _as_in_the_dataset(validation: Mapping[str, Tensor]) -> Tensor:
    """Rows of VALIDATION in the order of the dataset, [samples] int64: a metric of the user's may go by it."""
    places = validation.get(PLACES)
    return torch.arange(len(validation["target"])) if places is None else places.argsort()


def _standard_error(metric: CustomMetric, outputs: Tensor, target: Tensor, request: ScoreRequest) -> float:
    """NaN where it cannot be said, as when the metric cannot be computed on a part of the samples."""
    try:
        return standard_error(
            lambda part: call_metric(metric, outputs[part], target[part], request.project), len(target)
        )
    except UserError:
        return math.nan


def _outputs(
    folder: str,
    formats: Mapping[str, str],
    inputs: Sequence[TensorSpec],
    validation: Mapping[str, Tensor],
    order: Tensor,
    request: ScoreRequest,
) -> Outputs:
    """What each artifact gives on all validation samples, in this order of theirs."""
    found: Outputs = {}
    batch = samples_of_a_call(inputs, request.batch)
    for kind, file in formats.items():
        call = load_artifact(kind, Path(folder) / file, request.threads)
        asked = validation_batches(validation, inputs, batch)
        found[kind] = joined([call(probe.inputs)[0] for probe, _ in asked])[order]
    return found


def _worst(metric: CustomMetric, measured: Mapping[str, Mapping[str, float]]) -> str | None:
    """The format in which a release is worst by this metric; None where it could not be measured."""
    values = {kind: found[metric.name] for kind, found in measured.items() if metric.name in found}
    pick = min if metric.better == "higher" else max
    return pick(values, key=lambda kind: values[kind]) if values else None


def _interval(
    metric: CustomMetric, outputs: tuple[Tensor, Tensor], target: Tensor, groups: Tensor | None, request: ScoreRequest
) -> dict[str, Interval]:
    """What the improvement may be; nothing with too few groups, or when the metric cannot be computed on drawn samples,
    which is printed."""
    resampling = request.resampling
    assert resampling is not None, "asked before"
    sign = 1.0 if metric.better == "higher" else -1.0
    processes = CORES if can_fork() else 1
    log, calls, told = EventLog(Path(request.folder) / EVENTS), 0, time.monotonic()

    def gain(index: Tensor) -> float:
        nonlocal calls, told
        calls += 1
        # Of the share of this process; the others are about as far.
        if time.monotonic() - told >= TOLD_SECONDS:
            told = time.monotonic()
            log.write("resampling", metric=metric.name, done=min(1.0, calls * processes / resampling.resamples))
        mine, theirs = (call_metric(metric, given[index], target[index], request.project) for given in outputs)
        return sign * (mine - theirs)

    try:
        interval = interval_of(gain, len(target), resampling, groups, processes)
        return {} if interval is None else {metric.name: interval}
    except (UserError, ChildDiedError) as mistake:
        print(f"{metric.name} cannot be computed on drawn samples, so there is no interval: {mistake}")
        return {}

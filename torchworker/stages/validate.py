"""The clean room: artifacts against reference data, in a process that cannot import the code that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchworker.contract import (
    INT8_OF,
    PARITY,
    VALIDATION,
    ErrorCounts,
    Int8,
    Mismatch,
    TensorSpec,
    ValidateRequest,
    ValidateResult,
    Verdict,
)
from torchworker.gates.limits import apply_limits, not_measured
from torchworker.parity.clean_room import forbid_user_code
from torchworker.parity.compare import Decisions, Finding, ParityResult, Policy, compare, verdict
from torchworker.parity.histogram import ErrorHistogram
from torchworker.parity.int8 import examine, kept
from torchworker.parity.probes import BATCHES, SAMPLES, Probe
from torchworker.parity.reference import read_probes, read_unasked, validation_key
from torchworker.parity.rule import compare_tensors, usual_loss
from torchworker.process.failure import describe
from torchworker.process.fork import CORES, ChildDiedError, CrashNote, run_parallel
from torchworker.project.metrics import metric_sum
from torchworker.runtimes import cpp_runner
from torchworker.runtimes.load import Call, checked, load_artifact

MISMATCHES = 30
"""At most this many are reported; the first tell what is wrong."""
NO_FLOAT64 = "float32 eager, with the rounding of weights and inputs (the model does not run in float64)"


def validate(request: ValidateRequest) -> ValidateResult:
    """Parity on every probe and quality on the validation set, for each format."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    folder = Path(request.folder)
    for library in request.libraries:
        torch.ops.load_library(str(folder / library))  # type: ignore[no-untyped-call]
    probes = [_ordered(probe, request.inputs) for probe in read_probes(folder)]
    golden = [probe for probe in probes if probe.group == BATCHES]
    validation = load_file(folder / VALIDATION)
    samples = len(validation["target"])
    batch = _size(golden[1])
    unasked = "; ".join(read_unasked(folder))
    policy = Policy(not_finite=request.not_finite, refusals=request.refusals)
    outputs = [spec.name for spec in request.outputs]
    verdicts: list[Verdict] = []
    mismatches: list[Mismatch] = []
    errors: list[ErrorCounts] = []
    metrics: dict[str, dict[str, float]] = {}

    def quantized(kind: str, file: str, note: CrashNote) -> tuple[Int8, dict[str, float]]:
        assert request.int8 is not None, "whoever makes a variant says what is asked of it"
        try:
            call = _noted(load_artifact(kind, folder / file, request.threads), note)
            found, measured = examine(
                call, probes, validation, request.inputs, outputs, request.metrics, batch, request.int8
            )
        except Exception as error:
            return Int8(reason=f"it cannot be examined: {describe(error)}"), {}
        failed = [item for item in apply_limits(kind, measured, request.gates, samples, {}) if not item.passed]
        reasons = [found.reason, *(f"{item.gate} {item.measured}, expected {item.limit}" for item in failed)]
        return replace(found, reason="; ".join(reason for reason in reasons if reason)), measured

    def examined(
        kind: str, file: str, note: CrashNote
    ) -> tuple[list[Verdict], list[Mismatch], dict[str, float] | None, list[ErrorCounts]]:
        try:
            call = _noted(load_artifact(kind, folder / file, request.threads), note)
        except Exception as error:
            return [not_measured(kind, PARITY, "load", "loads without training code", describe(error))], [], None, []
        result = compare(kind, call, probes, outputs, policy)
        measured, on_validation = _quality(kind, call, validation, request, batch)
        cpp = _without_python(kind, folder / file, probes, validation, request)
        found = [*result.findings, *on_validation.findings, *cpp.findings]
        found.sort(key=lambda item: -item.outcome.ratio)
        gates = apply_limits(kind, measured, request.gates, samples, {})
        missing = [replace(not_measured(kind, PARITY, "not asked", "<= 1", unasked), ran=False)] if unasked else []
        told = [*result.verdicts, *missing, *on_validation.verdicts, *gates, *cpp.verdicts]
        counts = [*_counts(kind, result, on_validation), *_counts(f"{kind} in C++", cpp)]
        return told, [item.mismatch() for item in found[:MISMATCHES]], measured, counts

    works: dict[str, Callable[[], Any]] = {}
    notes = {kind: CrashNote() for kind in request.formats}
    for kind, file in request.formats.items():
        print(f"validate: {kind}: {len(probes)} probes", flush=True)
        works[kind] = partial(quantized if kind in INT8_OF else examined, kind, file, notes[kind])
    int8: dict[str, Int8] = {}
    # An artifact may take its process down: ONNX Runtime aborts on a bad index inside a loop.
    for kind, begun in run_parallel(works, notes, max(1, CORES // request.threads)):
        if kind in INT8_OF:
            try:
                found8, values = begun.result()
            except ChildDiedError as death:
                found8, values = Int8(reason=str(death)), {}
            int8[kind] = found8
            if not found8.reason:
                metrics[kind] = values
                verdicts += kept(kind, found8, request.int8, samples)
                verdicts += apply_limits(kind, values, request.gates, samples, {})
            continue
        try:
            told, found, measured, counts = begun.result()
        except ChildDiedError as death:
            ended = not_measured(kind, PARITY, "probes", "survives them", str(death))
            told, found, measured, counts = [ended], [], None, []
        verdicts += told
        mismatches += found
        errors += counts
        if measured is not None:
            metrics[kind] = measured
    return ValidateResult(
        verdicts=verdicts,
        metrics=metrics,
        reference="the model in float64" if any(probe.exact for probe in golden) else NO_FLOAT64,
        validation_samples=samples,
        int8=int8,
        mismatches=sorted(mismatches, key=lambda item: -item.ratio)[:MISMATCHES],
        errors=errors,
    )


def _counts(kind: str, *results: ParityResult) -> list[ErrorCounts]:
    """How far the artifact was from the model, over all that was checked."""
    whole = ErrorHistogram()
    for result in results:
        whole.merge(result.histogram)
    return whole.counts(kind, frozenset(item.probe.group for result in results for item in result.findings))


def _without_python(
    kind: str, artifact: Path, probes: Sequence[Probe], validation: Mapping[str, Tensor], request: ValidateRequest
) -> ParityResult:
    """The same questions to the same artifact in the C++ runner; what decides metrics and latency is in Python."""
    if request.cpp == "off" or kind not in cpp_runner.KINDS:
        return ParityResult(verdicts=[], findings=[])
    name = f"{kind} in C++"
    if not request.runner or request.libraries:
        why = request.no_runner if not request.runner else "it does not load libraries with custom operators"
        failed = not_measured(name, PARITY, "without Python", "<= 1", f"not run: {why}")
        return ParityResult(verdicts=[replace(failed, ran=request.cpp == "required")], findings=[])
    log = Path(request.log) / f"cpp-{kind}.log"
    print(f"validate: {name}: {len(probes)} probes", flush=True)
    policy = Policy(not_finite=request.not_finite, refusals=request.refusals)
    try:
        with cpp_runner.running(Path(request.runner), kind, artifact, request.threads, log) as answer:
            # The runner takes what it is given; whoever calls compiled code checks first.
            call = checked(answer, artifact) if kind == "aoti" else answer
            result = compare(name, call, probes, [spec.name for spec in request.outputs], policy)
            batch = _size([probe for probe in probes if probe.group == BATCHES][1])
            _, on_samples = _quality(name, call, validation, replace(request, metrics=()), batch)
            result.histogram.merge(on_samples.histogram)
    except cpp_runner.RunnerEndedError as error:
        failed = not_measured(name, PARITY, "without Python", "loads and answers", describe(error))
        return ParityResult(verdicts=[failed], findings=[])
    return ParityResult(
        verdicts=[*result.verdicts, *on_samples.verdicts],
        findings=[*result.findings, *on_samples.findings],
        histogram=result.histogram,
    )


def _noted(call: Call, note: CrashNote) -> Call:
    """The call, leaving word of what it is asked."""

    def noted(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        told = []
        for name, tensor in inputs.items():
            ends = f" from {float(tensor.min()):g} to {float(tensor.max()):g}" if tensor.numel() else ""
            told.append(f"{name} {list(tensor.shape)}{ends}")
        note.write(", ".join(told))
        return call(inputs)

    return noted


def _ordered(probe: Probe, inputs: Sequence[TensorSpec]) -> Probe:
    """Inputs in the order of the signature."""
    return replace(probe, inputs={spec.name: probe.inputs[spec.name] for spec in inputs})


def _quality(
    kind: str, call: Call, validation: Mapping[str, Tensor], request: ValidateRequest, batch: int
) -> tuple[dict[str, float], ParityResult]:
    """Each metric over the whole validation set from the artifact's own outputs, and parity on the same samples.

    batch: the size of batch that the reference outputs were made in; a model may look across its batch.
    """
    samples = len(validation["target"])
    inputs = {spec.name: validation[f"input.{spec.name}"] for spec in request.inputs}
    starts = range(0, samples, batch)
    usual = {spec.name: usual_loss(_answers(validation, spec.name, starts)) for spec in request.outputs}
    sums = {name: [0.0, 0] for name in request.metrics}
    decisions, histogram = Decisions(), ErrorHistogram()
    ratio, notes, findings = 0.0, {}, []
    try:
        for start in starts:
            part = slice(start, start + batch)
            fed = {name: tensor[part].contiguous() for name, tensor in inputs.items()}
            outputs = call(fed)
            for position, (spec, tensor) in enumerate(zip(request.outputs, outputs, strict=True)):
                eager = validation[validation_key("eager", spec.name, start)]
                others = [validation.get(validation_key(kind, spec.name, start)) for kind in ("float64", "moved")]
                outcome = compare_tensors(tensor, eager, *others, usual=usual[spec.name])
                histogram.add(SAMPLES, tensor, eager)
                if outcome.ratio >= ratio:
                    ratio = outcome.ratio
                    notes[spec.name] = outcome.note
                if not outcome.passed:
                    probe = Probe(name=f"samples {start} to {start + len(eager)}", group=SAMPLES, inputs=fed)
                    findings.append(Finding(kind, probe, spec.name, outcome, tensor, eager))
                if position == 0 and "accuracy" in request.metrics:
                    decisions.add(tensor, eager, validation["target"][part], outcome.allowed)
            for name in request.metrics:
                value, count = metric_sum(name, outputs[0], validation["target"][part])
                sums[name][0] += value
                sums[name][1] += count
    except Exception as error:
        failed = not_measured(kind, "quality", f"{samples} samples", "runs", describe(error))
        return {}, ParityResult(verdicts=[failed], findings=findings, histogram=histogram)
    note = "; ".join(f"{name}: {note}" for name, note in notes.items())
    verdicts = [verdict(kind, f"{samples} samples", ratio, note)]
    if "accuracy" in request.metrics and request.outputs[0].dtype.startswith(("float", "bfloat")):
        verdicts.append(decisions.verdict(kind))
    measured = {name: total / count for name, (total, count) in sums.items()}
    return measured, ParityResult(verdicts=verdicts, findings=findings, histogram=histogram)


def _answers(
    validation: Mapping[str, Tensor], output: str, starts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The model's answers to the validation samples, each with what its rounding is measured by."""
    for start in starts:
        exact, perturbed = (validation.get(validation_key(part, output, start)) for part in ("float64", "moved"))
        yield validation[validation_key("eager", output, start)], exact if exact is not None else perturbed


def _size(probe: Probe) -> int:
    return int(probe.name.removeprefix("batch_"))

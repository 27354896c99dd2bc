"""The clean room: artifacts against reference data, in a process that cannot import the code that made them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from torchworker.contract import (
    EVENTS,
    IN_CPP,
    INT8_OF,
    MIN_SAMPLES,
    PARITY,
    RUN_IN_CPP,
    VALIDATION,
    AnswerCounts,
    ErrorCounts,
    Int8,
    Mismatch,
    ValidateRequest,
    ValidateResult,
    Verdict,
)
from torchworker.gates.limits import apply_limits, not_measured
from torchworker.parity.clean_room import forbid_user_code
from torchworker.parity.compare import (
    Decisions,
    Finding,
    Outside,
    ParityResult,
    Policy,
    compare,
    compare_output,
    same_weights,
    usual_losses,
    verdict,
)
from torchworker.parity.histogram import ErrorHistogram
from torchworker.parity.int8 import examine, kept
from torchworker.parity.probes import BATCHES, SAMPLES, Probe
from torchworker.parity.reference import (
    SECONDS,
    asked_of,
    other_batches,
    read_independence,
    read_probes,
    read_unasked,
    validation_batches,
)
from torchworker.process.events import EventLog
from torchworker.process.failure import describe
from torchworker.process.fork import CORES, ChildDiedError, CrashNote, ForkedCall, run_parallel
from torchworker.project.answer_counts import CountedAnswers
from torchworker.project.metrics import MetricSums
from torchworker.project.signature import samples_of_a_call
from torchworker.project.weights import LARGE_BYTES
from torchworker.runtimes import cpp_runner
from torchworker.runtimes.load import Call, checked, load_artifact, load_libraries, load_with_weights

Result = TypeVar("Result")

MISMATCHES = 30
"""At most this many are reported; the first tell what is wrong."""
NO_FLOAT64 = "float32 eager, with the rounding of weights and inputs (the model does not run in float64)"


def validate(request: ValidateRequest) -> ValidateResult:
    """Parity on every probe and quality on the validation set, for each format."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    folder = Path(request.folder)
    load_libraries(folder / library for library in request.libraries)
    probes = [probe.ordered(request.inputs) for probe in read_probes(folder)]
    golden = [probe for probe in probes if probe.group == BATCHES]
    batch = samples_of_a_call(request.inputs, golden[1].size)
    validation = load_file(folder / VALIDATION)
    samples = len(validation["target"])
    unasked = "; ".join(read_unasked(folder))
    outputs = [spec.name for spec in request.outputs]
    verdicts: list[Verdict] = []
    mismatches: list[Mismatch] = []
    errors: list[ErrorCounts] = []
    metrics: dict[str, dict[str, float]] = {}
    standard_errors: dict[str, dict[str, float]] = {}
    answers: AnswerCounts | None = None

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
        kind: str, file: str, note: CrashNote, outside: Outside
    ) -> tuple[list[Verdict], list[Mismatch], MetricSums | None, AnswerCounts | None, list[ErrorCounts]]:
        try:
            loaded = load_with_weights(kind, folder / file, request.threads)
            call = _noted(loaded.call, note)
            same = same_weights(kind, loaded, Path(request.weights), request.weight_names) if request.weights else []
        except Exception as error:
            return (
                [not_measured(kind, PARITY, "load", "loads without training code", describe(error))],
                [],
                None,
                None,
                [],
            )
        sums, answers, result = _checked(kind, call, probes, validation, request, outside)
        outside.asking.write("")
        cpp = _without_python(kind, folder / file, probes, validation, request)
        found = sorted([*result.findings, *cpp.findings], key=lambda item: -item.outcome.ratio)
        gates = apply_limits(kind, sums.means(), request.gates, samples, {})
        missing = [replace(not_measured(kind, PARITY, "not asked", "<= 1", unasked), ran=False)] if unasked else []
        told = [*result.verdicts, *same, *missing, *gates, *cpp.verdicts]
        errors = [*result.errors(kind), *cpp.errors(f"{kind} {IN_CPP}")]
        return told, [item.mismatch() for item in found[:MISMATCHES]], sums, answers, errors

    if request.cpp == "required" and not any(kind in RUN_IN_CPP for kind in request.formats):
        why = f"not run: neither of {', '.join(RUN_IN_CPP)} is among the artifacts"
        verdicts.append(not_measured(IN_CPP, PARITY, "without Python", "<= 1", why))
    works: dict[str, Callable[[], Any]] = {}
    notes = {kind: CrashNote() for kind in request.formats}
    outside = {kind: Outside() for kind in request.formats}
    for kind, file in request.formats.items():
        print(f"validate: {kind}: {len(probes)} probes", flush=True)
        more = () if kind in INT8_OF else (outside[kind],)
        work = partial(quantized if kind in INT8_OF else examined, kind, file, notes[kind], *more)
        works[kind] = partial(_with_event, kind, work, Path(request.log) / EVENTS if request.log else None)
    int8: dict[str, Int8] = {}
    # An artifact may take its process down.
    large = any((folder / file).stat().st_size > LARGE_BYTES for file in request.formats.values())
    for kind, begun in run_parallel(works, notes, 1 if large else max(1, CORES // request.threads)):
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
            told, found, sums, answered, counts = outliving(begun, works[kind], notes[kind], outside[kind])
        except ChildDiedError as death:
            ended = not_measured(kind, PARITY, "probes", "survives them", str(death))
            told, found, sums, answered, counts = [ended], [], None, None, []
        verdicts += told
        mismatches += found
        errors += counts
        answers = answers or answered
        if sums is not None:
            metrics[kind], standard_errors[kind] = sums.means(), sums.standard_errors()
    asked = asked_of(validation)
    verdicts += too_few_asked(asked, samples, request.min_samples, float(validation.get(SECONDS, 0.0)))
    return ValidateResult(
        verdicts=verdicts,
        metrics=metrics,
        standard_errors=standard_errors,
        reference="the model in float64" if any(probe.exact for probe in golden) else NO_FLOAT64,
        validation_samples=samples,
        asked=asked,
        int8=int8,
        mismatches=sorted(mismatches, key=lambda item: -item.ratio)[:MISMATCHES],
        errors=errors,
        independence=read_independence(folder),
        answers=answers,
    )


def of_samples(asked: int, samples: int) -> str:
    """`360 samples`, or `300 of 10000 samples` where there was no time to ask the model about more."""
    return f"{samples} samples" if asked == samples else f"{asked} of {samples} samples"


def too_few_asked(asked: int, samples: int, least: int, seconds: float) -> list[Verdict]:
    """The verdict on how many samples artifacts are held against the model on; none where they are all.

    Args:
        asked: samples that the model was asked about.
        samples: how many there are.
        least: `parity.min_samples` of the job.
        seconds: how long the model was asked.
    """
    if asked >= samples:
        return []
    least = min(least, samples)
    enough = math.ceil(1.25 * seconds * least / max(1, asked))
    note = f"the model was asked for {seconds:.0f} s"
    if asked < least:
        note += f": parity.seconds: {enough} would do for {least}; parity.min_samples says how few are enough"
    return [
        Verdict(
            format="the model", gate=MIN_SAMPLES, case=f"{asked} of {samples} samples asked",
            measured=float(asked), limit=f">= {least}", passed=asked >= least, note=note,
        )
    ]  # fmt: skip


def _with_event(kind: str, work: Callable[[], Result], events: Path | None) -> Result:
    """What is asked of one format, with an event when that is done."""
    began = time.perf_counter()
    result = work()
    EventLog(events).write("asked", format=kind, seconds=time.perf_counter() - began)
    return result


def outliving(begun: ForkedCall[Result], work: Callable[[], Result], note: CrashNote, outside: Outside) -> Result:
    """The result, after another try for each question outside the signature that ended the artifact's process.

    Args:
        begun: the first try.
        work: what is done.
        note: as of `ForkedCall`.
        outside: what `work` goes by; gains the questions that ended it.

    Raises:
        ChildDiedError: another question ended it.
    """
    while True:
        try:
            return begun.result()
        except ChildDiedError as death:
            asked = outside.asking.read()
            if not asked or asked in outside.deadly:
                raise
            outside.deadly[asked] = str(death)
            outside.asking.write("")
            begun = ForkedCall(work, note)


def _policy(request: ValidateRequest) -> Policy:
    return Policy(not_finite=request.not_finite, refusals=request.refusals, relative=request.relative)


def _checked(
    kind: str,
    call: Call,
    probes: Sequence[Probe],
    validation: Mapping[str, Tensor],
    request: ValidateRequest,
    outside: Outside | None = None,
) -> tuple[MetricSums, AnswerCounts | None, ParityResult]:
    """Metrics of one artifact, and its parity on all probes and on the validation samples."""
    policy = _policy(request)
    outputs = [spec.name for spec in request.outputs]
    golden = [probe.size for probe in probes if probe.group == BATCHES]
    batch = samples_of_a_call(request.inputs, golden[1])
    samples = [probe for probe, _ in validation_batches(validation, request.inputs, batch, outputs) if probe.eager]
    # Where samples are coupled, an answer is one of its batch.
    other = other_batches(samples, golden, request.max_batch) if batch > 1 else ()
    result = compare(kind, call, [*probes, *other], outputs, policy, outside)
    sums, answers, on_samples = _quality(kind, call, validation, request, batch)
    return sums, answers, result + on_samples


def _without_python(
    kind: str, artifact: Path, probes: Sequence[Probe], validation: Mapping[str, Tensor], request: ValidateRequest
) -> ParityResult:
    """The same questions to the same artifact in the C++ runner; what decides metrics and latency is in Python."""
    if request.cpp == "off" or kind not in RUN_IN_CPP:
        return ParityResult()
    name = f"{kind} {IN_CPP}"
    if not request.runner or request.libraries:
        why = request.no_runner if not request.runner else "it does not load libraries with custom operators"
        failed = not_measured(name, PARITY, "without Python", "<= 1", f"not run: {why}")
        return ParityResult(verdicts=[replace(failed, ran=request.cpp == "required")])
    log = Path(request.log) / f"cpp-{kind}.log"
    print(f"validate: {name}: {len(probes)} probes", flush=True)
    try:
        with cpp_runner.running(Path(request.runner), kind, artifact, request.threads, log) as answer:
            # The runner takes what it is given; whoever calls compiled code checks first.
            call = checked(answer, artifact) if kind == "aoti" else answer
            return _checked(name, call, probes, validation, replace(request, metrics=()))[-1]
    except cpp_runner.RunnerEndedError as error:
        failed = not_measured(name, PARITY, "without Python", "loads and answers", describe(error))
        return ParityResult(verdicts=[failed])


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


def _quality(
    kind: str, call: Call, validation: Mapping[str, Tensor], request: ValidateRequest, batch: int
) -> tuple[MetricSums, AnswerCounts | None, ParityResult]:
    """Each metric over the whole validation set from the artifact's own outputs, and parity on those samples that the
    model was asked about; where no metric is wanted, the others are left out.

    batch: the size of batch that the reference outputs were made in; a model may look across its batch.
    """
    outputs = [spec.name for spec in request.outputs]
    given = list(validation_batches(validation, request.inputs, batch, outputs))
    samples = of_samples(asked_of(validation), len(validation["target"]))
    usual = usual_losses([probe for probe, _ in given if probe.eager], outputs, _policy(request))
    decisions, histogram, sums = Decisions(), ErrorHistogram(), MetricSums(request.metrics)
    answers = CountedAnswers(request.metrics)
    ratio, notes, findings = 0.0, {}, []
    try:
        for probe, target in given:
            if not probe.eager and not request.metrics:
                continue
            got = call(probe.inputs)
            for position, (name, tensor) in enumerate(zip(outputs, got, strict=True)):
                if not probe.eager:
                    # There was no time to ask the model.
                    continue
                eager = probe.eager[name]
                outcome = compare_output(tensor, probe, name, usual[name])
                histogram.add(SAMPLES, tensor, eager)
                if outcome.ratio >= ratio:
                    ratio = outcome.ratio
                    notes[name] = outcome.note
                if not outcome.passed:
                    findings.append(Finding(kind, probe, name, outcome, tensor, eager))
                if position == 0 and "accuracy" in request.metrics:
                    decisions.add(tensor, eager, target, outcome.allowed)
            sums.add(got[0], target)
            answers.add(got[0], target)
    except Exception as error:
        failed = not_measured(kind, "quality", samples, "runs", describe(error))
        return MetricSums(()), None, ParityResult(verdicts=[failed], findings=findings, histogram=histogram)
    note = "; ".join(f"{name}: {note}" for name, note in notes.items())
    verdicts = [verdict(kind, samples, ratio, note)]
    if "accuracy" in request.metrics and request.outputs[0].dtype.startswith(("float", "bfloat")):
        verdicts.append(decisions.verdict(kind))
    return sums, answers.counted(kind), ParityResult(verdicts=verdicts, findings=findings, histogram=histogram)

"""The last gate: the files that servers will read, as they came back from the bucket, loaded and run.

The candidate gives its golden outputs again, in every format; then candidate and live release are scored on the same
validation samples by the same process, so that the two numbers differ by the models alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchworker.contract import (
    GOLDEN,
    INT8_OF,
    METRICS,
    TOGETHER,
    Interval,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    TensorSpec,
    Verdict,
)
from torchworker.gates.bootstrap import count_groups, interval_of_mean
from torchworker.gates.limits import at_most
from torchworker.parity.clean_room import forbid_user_code
from torchworker.parity.compare import Policy, Usual, compare_output, usual_losses
from torchworker.parity.int8 import golden_noise
from torchworker.parity.joined import REMEDY, OneSampleError, ask_together
from torchworker.parity.probes import Probe
from torchworker.parity.reference import GROUP, read_golden, validation_batches
from torchworker.process.failure import UserError, describe
from torchworker.project.metrics import constant_score, mean_of, sample_sums
from torchworker.project.signature import samples_of_a_call
from torchworker.runtimes.load import Call, load_artifact, load_libraries, require_hashes

REHEARSAL = "rehearsal"
"""The gate of these verdicts."""
JOINED_SECONDS = 5.0
"""So long an ONNX artifact is asked samples together at sizes beyond the least number; no server of ours puts those of
other formats together, which may compile anew for each."""
JOINED_DB = 10.0
"""An int8 variant asked of samples alone and together reaches at least this, and so much less than over all of them."""

Scores = dict[str, dict[str, Tensor]]
"""Format to metric to its sum and count on each sample, [samples, 2]."""


class NotComparableError(Exception):
    """Why a release cannot be scored on the candidate's validation samples."""


def rehearse(request: RehearseRequest) -> RehearseResult:
    """Verdicts and metrics of the candidate, and the metrics of the live release or why there are none."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    candidate = request.candidate
    folder = Path(candidate.folder)
    require_hashes(folder, candidate.files)
    load_libraries(folder / name for name in candidate.libraries)
    outputs = [spec.name for spec in candidate.outputs]
    golden, usual = _golden(request, outputs)
    validation = load_file(request.validation) if request.validation else {}
    batch = golden[min(1, len(golden) - 1)].size
    # Then any artifact gives the same: nothing.
    empty = not all(_has_values(probe.inputs) for probe in golden) or not any(
        _has_values(probe.eager or {}) for probe in golden
    )
    if not empty:
        _require_declared(golden, candidate)
    verdicts: list[Verdict] = []
    classes = _classes(request, validation)
    mine: Scores = {}
    for kind, file in candidate.formats.items():
        try:
            call = load_artifact(kind, folder / file, request.threads)
        except Exception as error:
            verdicts.append(_verdict(kind, "load", None, describe(error)))
            continue
        if empty:
            verdicts.append(_verdict(kind, "golden inputs", None, "expected inputs and outputs with values, got none"))
            continue
        if kind in INT8_OF:
            verdicts.append(_noise_again(kind, call, golden, outputs, request.sqnr_db))
        else:
            verdicts += [_again(kind, call, probe, usual) for probe in golden]
        # What gives no golden output says nothing of whether samples see one another.
        if candidate.rows_together > 1 and all(verdict.passed for verdict in verdicts if verdict.format == kind):
            verdicts += _joined(kind, call, golden, request)
        if validation:
            try:
                (mine[kind],) = _score(call, validation, candidate, request.metrics, batch, [classes])
            except Exception as error:
                verdicts.append(_verdict(kind, "validation samples", None, describe(error)))
    theirs: Scores = {}
    own: Scores = {}
    problem = _score_live(request, validation, batch, classes, theirs, own)
    scored = request.metrics if theirs else ()
    known = any(not torch.equal(own[kind][name], found[name]) for kind, found in theirs.items() for name in found)
    return RehearseResult(
        verdicts=verdicts,
        candidate=_means(mine),
        live=_means(theirs),
        live_own=_means(own) if known else {},
        live_problem=problem,
        samples=len(validation["target"]) if validation else 0,
        intervals=_intervals(request, mine, theirs, validation.get(GROUP)),
        groups=count_groups(validation.get(GROUP)),
        live_spread={name: _spread(_worst(own, name)) for name in scored},
        constant={name: constant_score(name, validation["target"]) for name in scored},
    )


def _golden(request: RehearseRequest, outputs: Sequence[str]) -> tuple[list[Probe], dict[str, Usual]]:
    """What the candidate is asked, the smallest batch first, and what the model loses on each output.

    Raises UserError where its file holds anything else: whoever published the release has written it.
    """
    try:
        asked = read_golden(Path(request.candidate.folder), Path(request.moved) if request.moved else None)
        golden = [probe.ordered(request.candidate.inputs) for probe in asked]
        if not golden:
            raise ValueError("no batch")
        return golden, usual_losses(golden, outputs, Policy())
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{GOLDEN} of the release: expected tensors batch_<samples>.input.<name> and batch_<samples>.eager.<name> "
            f"for each input and output of its manifest, as `ship run` writes them; got {describe(error)[:300]}"
        ) from error


def _require_declared(golden: Sequence[Probe], candidate: RehearsedRelease) -> None:
    """Raises UserError for golden inputs of other sizes than the manifest says of inputs, by which servers go."""
    ranges = {dim.name: (dim.min, dim.max) for dim in candidate.dims}
    for probe in golden:
        for spec in candidate.inputs:
            found = list(probe.inputs[spec.name].shape)
            expected = "" if len(found) == len(spec.shape) else f"{len(spec.shape)} dimensions"
            for axis, (declared, size) in enumerate(zip(spec.shape, found, strict=False)):
                least, most = ranges.get(declared, (0, None)) if isinstance(declared, str) else (declared, declared)
                # Of coupled samples servers take one, and the golden outputs are of a batch.
                if least <= size <= (size if most is None else most) or (axis == 0 and declared == 1):
                    continue
                limit = f"{least:,}" if least == most else f"{least:,} to {most:,}" if most else f"at least {least:,}"
                expected = f"{declared} of {limit}" if isinstance(declared, str) else f"{limit} along axis {axis}"
                break
            if expected:
                raise UserError(
                    f"{GOLDEN} of the release: {probe.name}: expected {expected}, as its manifest says of input "
                    f"{spec.name} [{', '.join(map(str, spec.shape))}], got {found}: what is tried has to be what "
                    "servers take; publish it with the sizes of its golden inputs"
                )


def _classes(request: RehearseRequest, validation: Mapping[str, Tensor]) -> int:
    """How many classes the candidate or the live release has, whichever has more; 0 where that is not known."""
    found = [0]
    for release in (request.candidate, request.live):
        first = release.outputs[0].shape[1:] if release is not None and release.outputs else ()
        if validation and len(first) == validation["target"].dim() and isinstance(first[0], int):
            found.append(first[0])
    return max(found)


def _score_live(
    request: RehearseRequest,
    validation: Mapping[str, Tensor],
    batch: int,
    classes: int,
    scores: Scores,
    own: Scores,
) -> str:
    """Fill in the live release's scores, or say what is in the way. Never raises for what the live release is like.

    Args:
        request: names the release.
        validation: the samples.
        batch: samples of a call.
        classes: labels below it count.
        scores: gets them by format.
        own: the same on labels that are its own classes.
    """
    live = request.live
    if live is None or not validation:
        return ""
    try:
        require_hashes(Path(live.folder), live.files)
    except (OSError, RuntimeError) as error:
        return f"it is broken: {error}"
    if request.live_validation:
        validation = load_file(request.live_validation)
    for kind, file in live.formats.items():
        try:
            _require_same_inputs(live.inputs, validation)
            call = load_artifact(kind, Path(live.folder) / file, request.threads)
            scores[kind], own[kind] = _score(call, validation, live, request.metrics, batch, [classes, 0])
        except Exception as error:
            scores.clear()
            own.clear()
            return f"{kind}: {error if isinstance(error, NotComparableError) else describe(error)}"
    return "" if scores else "it holds no artifact"


def _means(scores: Scores) -> dict[str, dict[str, float]]:
    """Format to metric to value: the mean over all samples."""
    return {kind: {name: mean_of(sums) for name, sums in found.items()} for kind, found in scores.items()}


def _intervals(request: RehearseRequest, mine: Scores, theirs: Scores, groups: Tensor | None) -> dict[str, Interval]:
    """What each improvement may be, between the formats at which either release is worst.

    groups: [samples] int64, of the file of held-out samples; None where samples are independent.
    """
    if request.resampling is None or not mine or not theirs:
        return {}
    found = {}
    for name in request.metrics:
        candidate, live = _worst(mine, name), _worst(theirs, name)
        # Each with its own counts: a model with fewer classes takes more labels for padding.
        gains = _sign(name) * (_influence(candidate) - _influence(live))
        interval = interval_of_mean(gains, request.resampling, groups)
        if interval is not None:
            found[name] = interval
    return found


def _influence(sums: Tensor) -> Tensor:
    """What each sample makes of a metric, [samples], with the metric as their mean.

    Where samples count differently many elements (some labels are padding), the metric is a ratio of sums, which is
    linearized: a sample differs by what it adds to the numerator less what the ratio says for its elements.

    sums: [samples, 2], of `sample_sums`.
    """
    values, counts = sums[:, 0], sums[:, 1]
    each = float(counts.mean())
    if bool((counts == each).all()):
        return values / each
    ratio = mean_of(sums)
    return ratio + (values - ratio * counts) / each


def _worst(scores: Scores, name: str) -> Tensor:
    """A metric of each sample, [samples, 2], of the format that is worst at it."""
    return min((found[name] for found in scores.values()), key=lambda sums: _sign(name) * mean_of(sums))


def _sign(name: str) -> float:
    return 1.0 if METRICS[name] == "higher" else -1.0


def _spread(sums: Tensor) -> float:
    """Standard deviation of one sample's value. sums: [samples, 2]."""
    return float(_influence(sums).std(correction=0))


def _has_values(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.numel() for tensor in tensors.values())


def _again(kind: str, call: Call, probe: Probe, usual: Mapping[str, Usual]) -> Verdict:
    """Whether the artifact still gives the golden outputs at one batch size, as the clean room saw it do.

    usual: by output, of `usual_losses`.
    """
    case = f"batch {probe.size}"
    try:
        got = call({name: tensor.clone() for name, tensor in probe.inputs.items()})
    except Exception as error:
        return _verdict(kind, case, None, describe(error))
    if len(got) != len(usual):
        return _verdict(kind, case, None, f"{len(got)} outputs, expected {len(usual)}")
    try:
        found = {
            name: compare_output(tensor, probe, name, usual[name]) for name, tensor in zip(usual, got, strict=True)
        }
    except Exception as error:
        return _verdict(kind, case, None, f"not comparable with {GOLDEN}: {describe(error)}")
    note = "; ".join(f"{name}: {outcome.note}" for name, outcome in found.items())
    return _verdict(kind, case, max(0.0, *(outcome.ratio for outcome in found.values())), note)


def _noise_again(kind: str, call: Call, golden: Sequence[Probe], outputs: Sequence[str], limit: float) -> Verdict:
    """Whether an int8 artifact is as near to the golden outputs as the clean room saw it be."""
    case = "golden inputs"
    try:
        noise = golden_noise(call, golden, outputs).decibels
    except Exception as error:
        return replace(_verdict(kind, case, None, describe(error)), limit=f">= {limit:g} dB")
    found = _verdict(kind, case, noise, "SQNR against the model in float32")
    return replace(found, limit=f">= {limit:g} dB", passed=noise >= limit)


def _joined(kind: str, call: Call, golden: Sequence[Probe], request: RehearseRequest) -> list[Verdict]:
    """Whether the answer to a sample is the same alone and among others, as servers put it.

    Args:
        kind: the format.
        call: the artifact.
        golden: what it is asked, the smallest batch first.
        request: names the release, the seed, and what int8 variants have to reach.
    """
    enough = max(request.sqnr_db - JOINED_DB, JOINED_DB) if kind in INT8_OF else None
    try:
        seconds = JOINED_SECONDS if kind.startswith("onnx") else 0.0
        found = ask_together(call, golden, request.candidate, request.seed, seconds, enough)
    except OneSampleError as error:
        # Where the held-out samples are at hand, the run that made it has asked this of the model.
        return [] if request.validation is not None else [_verdict(kind, TOGETHER, None, str(error))]
    except Exception as error:
        return [_verdict(kind, TOGETHER, None, describe(error))]
    said = _verdict(kind, TOGETHER, found.ratio, found.note)
    return [said if said.passed else replace(said, note=f"{REMEDY}. {said.note}")]


def _verdict(kind: str, case: str, ratio: float | None, note: str) -> Verdict:
    """ratio: None when it could not be measured, which is a failure."""
    return at_most(kind, REHEARSAL, case, ratio, 1, note)


def _require_same_inputs(inputs: Sequence[TensorSpec], validation: Mapping[str, Tensor]) -> None:
    """Raises NotComparableError unless the samples are what a model with these inputs takes."""
    given = {key.removeprefix("input."): tensor for key, tensor in validation.items() if key.startswith("input.")}
    wanted = {spec.name: spec for spec in inputs}
    if given.keys() != wanted.keys():
        raise NotComparableError(
            f"its inputs are {', '.join(wanted) or 'not known'}, the candidate's {', '.join(given)}"
        )
    for name, spec in wanted.items():
        tensor = given[name]
        dtype, fixed = str(tensor.dtype).removeprefix("torch."), list(spec.shape[1:])
        same = len(spec.shape) == tensor.dim() and all(
            isinstance(size, str) or size == got for size, got in zip(fixed, tensor.shape[1:], strict=True)
        )
        if dtype != spec.dtype or not same:
            raise NotComparableError(
                f"its input {name} is {spec.dtype} {list(spec.shape)}, the candidate's {dtype} "
                f"[batch, {', '.join(map(str, tensor.shape[1:]))}]"
            )


def _score(
    call: Call,
    validation: Mapping[str, Tensor],
    release: RehearsedRelease,
    metrics: Sequence[str],
    batch: int,
    counted: Sequence[int],
) -> list[dict[str, Tensor]]:
    """Each metric of each validation sample, [samples, 2] of `sample_sums`, from the artifact's own outputs.

    Returns:
        For each number of `counted`: over labels below it, and those that are classes of the release.
    """
    parts: list[dict[str, list[Tensor]]] = [{name: [] for name in metrics} for _ in counted]
    batch = samples_of_a_call(release.inputs, batch)
    for probe, target in validation_batches(validation, release.inputs, batch):
        outputs = call(probe.inputs)
        for part, classes in zip(parts, counted, strict=True):
            for name in metrics:
                part[name].append(sample_sums(name, outputs[0], target, classes))
    return [{name: torch.cat(found) for name, found in part.items()} for part in parts]

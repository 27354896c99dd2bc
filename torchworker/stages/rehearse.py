"""The last gate: the files that servers will read, as they came back from the bucket, loaded and run.

The candidate gives its golden outputs again, in every format; then candidate and live release are scored on the same
validation samples by the same process, so that the two numbers differ by the models alone.
"""

from __future__ import annotations

import hashlib
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
    Interval,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    TensorSpec,
    Verdict,
)
from torchworker.gates.bootstrap import interval_of_mean
from torchworker.parity.clean_room import forbid_user_code
from torchworker.parity.int8 import Noise
from torchworker.parity.rule import compare_tensors, usual_loss
from torchworker.process.failure import describe
from torchworker.project.metrics import metric_values
from torchworker.runtimes.load import Call, load_artifact

REHEARSAL = "rehearsal"
"""The gate of these verdicts."""

Scores = dict[str, dict[str, Tensor]]
"""Format to metric to its value on each sample, [samples]."""


class NotComparableError(Exception):
    """Why a release cannot be scored on the candidate's validation samples."""


def rehearse(request: RehearseRequest) -> RehearseResult:
    """Verdicts and metrics of the candidate, and the metrics of the live release or why there are none."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    candidate = request.candidate
    folder = Path(candidate.folder)
    _require_files(candidate)
    for name in candidate.files:
        if name.endswith(".so"):
            torch.ops.load_library(str(folder / name))  # type: ignore[no-untyped-call]
    golden = _golden(folder, Path(request.moved) if request.moved else None)
    validation = load_file(request.validation) if request.validation else {}
    batch = golden[min(1, len(golden) - 1)][0]
    usual = {
        spec.name: usual_loss((parts["eager"][spec.name], _reference(parts, spec.name)) for _, parts in golden)
        for spec in candidate.outputs
    }
    verdicts: list[Verdict] = []
    mine: Scores = {}
    for kind, file in candidate.formats.items():
        try:
            call = load_artifact(kind, folder / file, request.threads)
        except Exception as error:
            verdicts.append(_verdict(kind, "load", None, describe(error)))
            continue
        if kind in INT8_OF:
            verdicts.append(_noise_again(kind, call, golden, candidate, request.sqnr_db))
        else:
            verdicts += [_again(kind, call, size, parts, candidate, usual) for size, parts in golden]
        if validation:
            try:
                mine[kind] = _score(call, validation, candidate, request.metrics, batch)
            except Exception as error:
                verdicts.append(_verdict(kind, "validation samples", None, describe(error)))
    theirs: Scores = {}
    problem = _score_live(request, validation, batch, theirs)
    return RehearseResult(
        verdicts=verdicts,
        candidate=_means(mine),
        live=_means(theirs),
        live_problem=problem,
        samples=len(validation["target"]) if validation else 0,
        intervals=_intervals(request, mine, theirs),
    )


def _score_live(request: RehearseRequest, validation: Mapping[str, Tensor], batch: int, scores: Scores) -> str:
    """Fill in the live release's scores, or say what is in the way. Never raises for what the live release is like."""
    live = request.live
    if live is None or not validation:
        return ""
    for kind, file in live.formats.items():
        try:
            _require_same_inputs(live.inputs, validation)
            call = load_artifact(kind, Path(live.folder) / file, request.threads)
            scores[kind] = _score(call, validation, live, request.metrics, batch)
        except Exception as error:
            scores.clear()
            return f"{kind}: {error if isinstance(error, NotComparableError) else describe(error)}"
    return "" if scores else "it holds no artifact"


def _means(scores: Scores) -> dict[str, dict[str, float]]:
    """Format to metric to value: the mean over all samples."""
    return {kind: {name: float(values.mean()) for name, values in found.items()} for kind, found in scores.items()}


def _intervals(request: RehearseRequest, mine: Scores, theirs: Scores) -> dict[str, Interval]:
    """What each improvement may be, between the formats at which either release is worst."""
    if request.resampling is None or not mine or not theirs:
        return {}
    found = {}
    for name in request.metrics:
        sign = 1.0 if METRICS[name] == "higher" else -1.0
        candidate, live = (
            min((scores[name] for scores in side.values()), key=lambda values: sign * float(values.mean()))
            for side in (mine, theirs)
        )
        found[name] = interval_of_mean(sign * (candidate - live), request.resampling)
    return found


def _require_files(release: RehearsedRelease) -> None:
    """What runs here is what the manifest says: hashed by this process, which then loads it."""
    for name, sha256 in release.files.items():
        with (Path(release.folder) / name).open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != sha256:
            raise RuntimeError(f"{release.folder}/{name}: expected SHA-256 {sha256}, got {got}")


def _golden(folder: Path, perturbed: Path | None) -> list[tuple[int, dict[str, dict[str, Tensor]]]]:
    """By batch size, ascending: `input`, `eager`, and `float64` or `moved` tensors by name.

    Args:
        folder: the release's, with its golden outputs.
        perturbed: file with the model's answers after everything was perturbed by its rounding, for models without
            float64. It widens limits only, so it need not come from the bucket.
    """
    batches: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_file(folder / GOLDEN).items():
        name, part, of = key.split(".", 2)
        batches.setdefault(int(name.removeprefix("batch_")), {}).setdefault(part, {})[of] = tensor
    for key, tensor in (load_file(perturbed) if perturbed is not None else {}).items():
        name, part, of = key.split("/", 2)
        size = int(name.removeprefix("batch_")) if name.startswith("batch_") else 0
        if part == "moved" and size in batches:
            batches[size].setdefault(part, {})[of] = tensor
    return sorted(batches.items())


def _reference(parts: Mapping[str, Mapping[str, Tensor]], output: str) -> Tensor | None:
    """What the rounding of the model's own answer is measured by."""
    return parts.get("float64", {}).get(output, parts.get("moved", {}).get(output))


def _again(
    kind: str,
    call: Call,
    size: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    release: RehearsedRelease,
    usual: Mapping[str, float],
) -> Verdict:
    """Whether the artifact still gives the golden outputs at one batch size, as the clean room saw it do.

    usual: by output, of `usual_loss`.
    """
    case = f"batch {size}"
    try:
        got = call({spec.name: parts["input"][spec.name].clone() for spec in release.inputs})
    except Exception as error:
        return _verdict(kind, case, None, describe(error))
    if len(got) != len(release.outputs):
        return _verdict(kind, case, None, f"{len(got)} outputs, expected {len(release.outputs)}")
    ratio, notes = 0.0, []
    for spec, tensor in zip(release.outputs, got, strict=True):
        exact, perturbed = (parts.get(part, {}).get(spec.name) for part in ("float64", "moved"))
        outcome = compare_tensors(tensor, parts["eager"][spec.name], exact, perturbed, usual=usual[spec.name])
        ratio = max(ratio, outcome.ratio)
        notes.append(f"{spec.name}: {outcome.note}")
    return _verdict(kind, case, ratio, "; ".join(notes))


def _noise_again(
    kind: str,
    call: Call,
    golden: Sequence[tuple[int, Mapping[str, Mapping[str, Tensor]]]],
    release: RehearsedRelease,
    limit: float,
) -> Verdict:
    """Whether an int8 artifact is as near to the golden outputs as the clean room saw it be."""
    noise = Noise()
    case, words = "golden inputs", f">= {limit:g} dB"
    try:
        for _, parts in golden:
            got = call({spec.name: parts["input"][spec.name].clone() for spec in release.inputs})
            for spec, tensor in zip(release.outputs, got, strict=True):
                if parts["eager"][spec.name].is_floating_point():
                    noise.add(spec.name, tensor, parts["eager"][spec.name])
    except Exception as error:
        return replace(_verdict(kind, case, None, describe(error)), limit=words)
    found = _verdict(kind, case, noise.decibels, "SQNR against the model in float32")
    return replace(found, limit=words, passed=noise.decibels >= limit)


def _verdict(kind: str, case: str, ratio: float | None, note: str) -> Verdict:
    """ratio: None when it could not be measured, which is a failure."""
    return Verdict(
        format=kind,
        gate=REHEARSAL,
        case=case,
        measured=ratio,
        limit="<= 1",
        passed=ratio is not None and ratio <= 1,
        note=note,
    )


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
) -> dict[str, Tensor]:
    """Each metric of each validation sample, [samples] float64, from the artifact's own outputs."""
    samples = len(validation["target"])
    parts: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for start in range(0, samples, batch):
        part = slice(start, start + batch)
        outputs = call({spec.name: validation[f"input.{spec.name}"][part].contiguous() for spec in release.inputs})
        for name in metrics:
            # All samples have one shape, so the mean of their means is the mean over all elements.
            values = metric_values(name, outputs[0], validation["target"][part]).to(torch.float64)
            parts[name].append(values.flatten(1).mean(1) if values.dim() > 1 else values)
    return {name: torch.cat(found) for name, found in parts.items()}

"""The clean room: artifacts against reference data, in a process that cannot import the code that made them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file
from torch import Tensor

from torchworker import runtimes
from torchworker.contract import GOLDEN, METRICS, VALIDATION, Gate, ValidateRequest, ValidateResult, Verdict
from torchworker.failure import describe, is_theirs
from torchworker.metrics import metric_sum
from torchworker.parity import compare

LATENCY_CALLS = 30
WARM_UP_CALLS = 3


class _NoUserCode(importlib.abc.MetaPathFinder):
    """Refuses the user's modules by name and by place, also when they are installed in the environment."""

    def __init__(self, modules: Sequence[str], folder: str) -> None:
        self._modules, self._folder = frozenset(modules), Path(folder)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        inside = any(is_theirs(entry, self._folder) for entry in path or ())
        if fullname.partition(".")[0] in self._modules or inside:
            raise ImportError(f"the artifact needs the training code ({fullname}); a release must stand alone")
        return None


def forbid_user_code(modules: Sequence[str], folder: str) -> None:
    """From here on, importing any of these modules, or anything from the folder, fails."""
    sys.path[:] = [entry for entry in sys.path if entry and not is_theirs(entry, Path(folder))]
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] in modules:
            raise AssertionError(f"user module {loaded} was imported before the clean room was closed")
    sys.meta_path.insert(0, _NoUserCode(modules, folder))


def validate(request: ValidateRequest) -> ValidateResult:
    """Parity at every reference batch, quality on the validation set, and latency, for each format."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    folder = Path(request.folder)
    golden = load_file(folder / GOLDEN)
    validation = load_file(folder / VALIDATION)
    samples = len(validation["target"])
    batch = _sizes(golden)[1]
    has_exact = any(".float64." in name for name in golden)
    verdicts: list[Verdict] = []
    metrics: dict[str, dict[str, float]] = {}
    for kind, file in request.formats.items():
        try:
            call = runtimes.load(kind, folder / file, request.threads)
        except Exception as error:
            verdicts.append(_not_measured(kind, "parity", "load", "loads without training code", describe(error)))
            continue
        verdicts += _parity(kind, call, golden, request)
        measured, on_validation = _quality(kind, call, validation, request, batch)
        verdicts += on_validation
        if measured or not request.metrics:
            measured |= _latency(call, golden)
        metrics[kind] = measured
        verdicts += _gates(kind, measured, request.gates, samples)
    return ValidateResult(
        verdicts=verdicts,
        metrics=metrics,
        reference="the model in float64" if has_exact else "float32 eager (the model does not run in float64)",
        validation_samples=samples,
    )


def _not_measured(kind: str, gate: str, case: str, limit: str, note: str) -> Verdict:
    return Verdict(format=kind, gate=gate, case=case, measured=None, limit=limit, passed=False, note=note)


def _sizes(golden: Mapping[str, Tensor]) -> list[int]:
    return sorted({int(name.split(".")[0].removeprefix("batch_")) for name in golden})


def _inputs(golden: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    prefix = f"batch_{size}.input."
    return {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}


def _ordered(inputs: Mapping[str, Tensor], request: ValidateRequest) -> dict[str, Tensor]:
    return {spec.name: inputs[spec.name] for spec in request.inputs}


def _parity(kind: str, call: runtimes.Call, golden: Mapping[str, Tensor], request: ValidateRequest) -> list[Verdict]:
    """One verdict a batch size: the worst ratio over the outputs."""
    verdicts = []
    for size in _sizes(golden):
        inputs = _ordered(_inputs(golden, size), request)
        try:
            got = call({name: tensor.clone() for name, tensor in inputs.items()})
        except Exception as error:
            verdicts.append(_not_measured(kind, "parity", f"batch {size}", "<= 1", describe(error)))
            continue
        if len(got) != len(request.outputs):
            note = f"{len(got)} outputs, expected {len(request.outputs)}"
            verdicts.append(_not_measured(kind, "parity", f"batch {size}", "<= 1", note))
            continue
        ratio, notes = 0.0, []
        for spec, tensor in zip(request.outputs, got, strict=True):
            outcome = compare(
                tensor,
                golden[f"batch_{size}.eager.{spec.name}"],
                golden.get(f"batch_{size}.float64.{spec.name}"),
            )
            ratio = max(ratio, outcome.ratio)
            notes.append(f"{spec.name}: {outcome.reason or f'max |Δ| {outcome.max_difference:.1e}'}")
        verdicts.append(
            Verdict(
                format=kind,
                gate="parity",
                case=f"batch {size}",
                measured=ratio,
                limit="<= 1",
                passed=ratio <= 1,
                note="; ".join(notes),
            )
        )
    return verdicts


def _quality(
    kind: str, call: runtimes.Call, validation: Mapping[str, Tensor], request: ValidateRequest, batch: int
) -> tuple[dict[str, float], list[Verdict]]:
    """Each metric over the whole validation set from the artifact's own outputs, and parity on the same samples.

    batch: the size of batch that the reference outputs were made in; a model may look across its batch.
    """
    samples = len(validation["target"])
    inputs = {spec.name: validation[f"input.{spec.name}"] for spec in request.inputs}
    sums = {name: [0.0, 0] for name in request.metrics}
    ratio, notes = 0.0, {}
    try:
        for start in range(0, samples, batch):
            part = slice(start, start + batch)
            outputs = call({name: tensor[part].contiguous() for name, tensor in inputs.items()})
            for spec, tensor in zip(request.outputs, outputs, strict=True):
                exact = validation.get(f"float64.{spec.name}")
                eager = validation[f"eager.{spec.name}"][part]
                outcome = compare(tensor, eager, exact[part] if exact is not None else None)
                if outcome.ratio >= ratio:
                    ratio = outcome.ratio
                    notes[spec.name] = outcome.reason or f"max |Δ| {outcome.max_difference:.1e}"
            for name in request.metrics:
                value, count = metric_sum(name, outputs[0], validation["target"][part])
                sums[name][0] += value
                sums[name][1] += count
    except Exception as error:
        return {}, [_not_measured(kind, "quality", f"{samples} samples", "runs", describe(error))]
    parity = Verdict(
        format=kind,
        gate="parity",
        case=f"{samples} samples",
        measured=ratio,
        limit="<= 1",
        passed=ratio <= 1,
        note="; ".join(f"{name}: {note}" for name, note in notes.items()),
    )
    return {name: total / count for name, (total, count) in sums.items()}, [parity]


def _latency(call: runtimes.Call, golden: Mapping[str, Tensor]) -> dict[str, float]:
    """Median wall-clock milliseconds of one call at batch 1 and at the batch of capture."""
    measured = {}
    for size in _sizes(golden)[:2]:
        inputs = _inputs(golden, size)
        for _ in range(WARM_UP_CALLS):
            call(inputs)
        times = []
        for _ in range(LATENCY_CALLS):
            began = time.perf_counter()
            call(inputs)
            times.append(time.perf_counter() - began)
        measured[f"p50_ms.batch_{size}"] = statistics.median(times) * 1000
    return measured


def _gates(kind: str, measured: Mapping[str, float], gates: Sequence[Gate], samples: int) -> list[Verdict]:
    """Fixed limits. A gate on something that was not measured has failed."""
    verdicts = []
    for gate in gates:
        value = measured.get("p50_ms.batch_1" if gate.name == "p50_ms" else gate.name)
        case = "batch 1" if gate.name == "p50_ms" else f"{samples} samples"
        conditions = [f">= {gate.min:g}"] if gate.min is not None else []
        conditions += [f"<= {gate.max:g}"] if gate.max is not None else []
        limit = " and ".join(conditions)
        if value is None or value != value:
            verdicts.append(_not_measured(kind, gate.name, case, limit, "could not be measured"))
            continue
        passed = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        verdicts.append(Verdict(format=kind, gate=gate.name, case=case, measured=value, limit=limit, passed=passed))
    return verdicts


def better(metric: str) -> str:
    """`higher` or `lower`: which direction of a metric is an improvement."""
    return METRICS.get(metric, "lower")

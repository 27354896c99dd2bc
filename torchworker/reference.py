"""The reference data that artifacts are held against: what the model itself gives, in float32 and in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchworker.contract import GOLDEN, VALIDATION, ExportRequest, Project
from torchworker.failure import UserMistake
from torchworker.parity import compare
from torchworker.project import batches, forward, name_inputs, name_outputs


def require_trained(model: nn.Module, probe: Path, project: Project) -> None:
    """The model rebuilt from its weights must give what the trained one gave at the end of training."""
    from safetensors.torch import load_file

    stored = load_file(probe)
    inputs = {name.removeprefix("input."): tensor for name, tensor in stored.items() if name.startswith("input.")}
    inputs = {name: inputs[name] for name in name_inputs(model, inputs, project)}
    outputs = name_outputs(forward(model, inputs, project), project)
    double = _double_model(model)
    exact = (_in_double(double, inputs, project) if double is not None else None) or {}
    for name, tensor in outputs.items():
        # The stored outputs are the ones on trial: the rounding that is allowed is the rebuilt model's own.
        outcome = compare(stored[f"output.{name}"], tensor, exact.get(name))
        if not outcome.passed:
            raise UserMistake(
                f"export: rebuilt from its weights, the model gives other outputs than when it was trained ({name}: "
                f"{outcome.reason or f'max |Δ| {outcome.max_difference:.1e}'}); forward uses something that is neither "
                "a parameter nor a persistent buffer, or its code was changed since: register_buffer it, or make it "
                "from a fixed seed"
            )


def enlarged(named: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Repeat a short batch up to the size of capture, so that a small validation set still exports at it."""
    enlarged = {}
    for name, tensor in named.items():
        repeats = -(-batch // tensor.shape[0])
        enlarged[name] = torch.cat([tensor] * repeats)[:batch].contiguous()
    return enlarged


def golden_sizes(batch: int) -> list[int]:
    """Batch sizes that artifacts are compared at: one, the one of capture, and a larger odd one."""
    return [1, batch, 2 * batch + 1]


def write_reference(
    request: ExportRequest, model: nn.Module, named: Mapping[str, Tensor], dataset: Dataset[Any]
) -> str:
    """`golden.safetensors`: inputs, eager outputs and, where the model allows, float64 outputs, per batch size.

    `validation.safetensors`: inputs and targets for the quality gate. Tensor names are
    `batch_<n>.input.<name>`, `batch_<n>.eager.<name>`, `batch_<n>.float64.<name>`; `input.<name>`, `eager.<name>`,
    `float64.<name>` and `target`.
    """
    from safetensors.torch import save_file

    project, folder = request.project, Path(request.folder)
    double = _double_model(model)
    stored: dict[str, Tensor] = {}
    with_double = double is not None
    for size in golden_sizes(request.batch):
        batch = enlarged(named, size) if size > request.batch else {name: t[:size] for name, t in named.items()}
        eager = _twice(model, batch, project)
        exact = _in_double(double, batch, project) if double is not None and with_double else None
        with_double = exact is not None
        for name, tensor in batch.items():
            stored[f"batch_{size}.input.{name}"] = tensor.contiguous()
        for name, tensor in eager.items():
            stored[f"batch_{size}.eager.{name}"] = tensor.contiguous()
        for name, tensor in (exact or {}).items():
            stored[f"batch_{size}.float64.{name}"] = tensor.contiguous()
    if not with_double:
        stored = {name: tensor for name, tensor in stored.items() if ".float64." not in name}
    save_file(_unshared(stored), folder / GOLDEN)
    _write_validation(request, model, double if with_double else None, dataset, folder)
    return "eager, checked against float64" if with_double else "eager only; the model does not run in float64"


def _twice(model: nn.Module, batch: Mapping[str, Tensor], project: Project) -> dict[str, Tensor]:
    """Eager outputs, after making sure that a second call gives the same and leaves the inputs alone."""
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    first = name_outputs(forward(model, batch, project), project)
    second = name_outputs(forward(model, batch, project), project)
    for name, tensor in first.items():
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            raise UserMistake(
                f"export: output {name!r} differs between two calls on the same inputs in eval mode; a model with "
                "randomness or state in forward cannot be proven equal to its export"
            )
    for name, tensor in batch.items():
        if not torch.equal(tensor.nan_to_num(), kept[name].nan_to_num()):
            raise UserMistake(
                f"export: forward changes its input {name!r} in place, which exported formats do not do; clone it first"
            )
    return first


def _double_model(model: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(model).double()
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _in_double(model: nn.Module, batch: Mapping[str, Tensor], project: Project) -> dict[str, Tensor] | None:
    """Outputs in float64, or None when the model fixes a precision inside."""
    doubled = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    try:
        outputs = name_outputs(forward(model, doubled, project), project)
    except UserMistake:
        return None
    if any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in outputs.values()):
        return None
    return outputs


def _write_validation(
    request: ExportRequest, model: nn.Module, double: nn.Module | None, dataset: Dataset[Any], folder: Path
) -> None:
    """Inputs and targets, and what the model makes of them: most of these samples no exporter has seen."""
    from safetensors.torch import save_file

    parts: dict[str, list[Tensor]] = {}
    for inputs, target in batches(dataset, request.batch, request.project, limit=request.validation_limit):
        named = name_inputs(model, inputs, request.project)
        for name, tensor in named.items():
            parts.setdefault(f"input.{name}", []).append(tensor)
        for name, tensor in name_outputs(forward(model, named, request.project), request.project).items():
            parts.setdefault(f"eager.{name}", []).append(tensor)
        exact = _in_double(double, named, request.project) if double is not None else None
        for name, tensor in (exact or {}).items():
            parts.setdefault(f"float64.{name}", []).append(tensor)
        parts.setdefault("target", []).append(target)
    save_file({name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, folder / VALIDATION)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; slices of one batch do."""
    return {name: tensor.clone() for name, tensor in tensors.items()}

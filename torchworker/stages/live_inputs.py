"""The validation samples as the live release takes them: prepared with its own files, not with what was fitted since.

A preprocessing that `data.factory` fits makes other columns of the same samples for each release. Held against the live
release on its own, a candidate is better or it is not; on the candidate's, the live release is asked nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchworker.contract import LIVE_VALIDATION, PLACES, LiveInputsRequest, LiveInputsResult, TensorSpec
from torchworker.parity.reference import GROUP, LABELS, SIZE, put_together
from torchworker.process.failure import UserError
from torchworker.project.answers import same_values
from torchworker.project.user_code import batches, build_dataset, describe_tensor, enter
from torchworker.project.weights import save_tensors

PREFIX = "input."


def live_inputs(request: LiveInputsRequest) -> LiveInputsResult:
    """Write LIVE_VALIDATION into the folder: the samples of the candidate's file, as `data.for_live` prepares them.

    Raises UserError where it fails, gives other samples, or does not do with the candidate's own files what
    `data.factory` did: then its inputs for the live release are none to go by.
    """
    torch.set_num_threads(1)
    enter(request.project)
    validation = load_file(request.validation)
    wrong = _changed(_prepared(request, request.own_files, request.own_inputs, validation), validation)
    samples = len(validation["target"])
    if wrong:
        raise UserError(
            f"{_named(request)} prepares {wrong:,} of {samples:,} samples otherwise than data.factory when it is given "
            "the candidate's own files; expected the same inputs: it has to do the same, but for what is fitted"
        )
    found = _prepared(request, request.files, request.inputs, validation)
    kept = {name: validation[name] for name in (LABELS, f"{SIZE}.{LABELS}", GROUP) if name in validation}
    save_tensors({**found, **kept}, Path(request.folder) / LIVE_VALIDATION)
    return LiveInputsResult(samples=samples, changed=_changed(found, validation))


def _named(request: LiveInputsRequest) -> str:
    reference = request.project.for_live
    assert reference is not None, "asked before"
    return f"{reference.where}: {reference.target}"


def _prepared(
    request: LiveInputsRequest, files: str, specs: Sequence[TensorSpec], validation: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs as `input.<name>`, and the target, of the samples that the candidate's file has, in the same batches:
    a collate function may pad each to its own length.

    Args:
        request: names the function.
        files: folder that it is given.
        specs: of the inputs of the release whose files these are.
        validation: tensors of the candidate's file.
    """
    reference = request.project.for_live
    assert reference is not None, "asked before"
    data = replace(reference, args={**reference.args, "files": Path(files)})
    project = replace(request.project, data=data)
    parts: dict[str, list[Tensor]] = {}
    names, places = [spec.name for spec in specs], validation[PLACES]
    # A stream is read from its beginning; the order is that of the file.
    chosen, order = places.sort().values.tolist(), places.argsort().argsort().tolist()
    dataset = build_dataset(project, "validation")
    for inputs, target in batches(dataset, request.batch, project, chosen, order=lambda _: order):
        for name, tensor in {**_by_name(inputs, names, request), "target": target}.items():
            parts.setdefault(name, []).append(tensor)
    found = put_together(parts)
    _require_same_target(found.get("target"), validation["target"], _named(request))
    return found


def _by_name(inputs: Any, names: Sequence[str], request: LiveInputsRequest) -> dict[str, Tensor]:
    """As the release calls them: by position, unless the data gives names."""
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if set(inputs) != set(names) if isinstance(inputs, Mapping) else len(inputs) != len(names):
        told = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"{len(inputs)} of them"
        raise UserError(f"{_named(request)} gives inputs {told}; expected those of the release, {', '.join(names)}")
    given = inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=True))
    return {f"{PREFIX}{name}": given[name] for name in names}


def _require_same_target(mine: Tensor | None, target: Tensor, named: str) -> None:
    if mine is not None and mine.shape == target.shape and mine.dtype == target.dtype:
        same = torch.allclose(mine, target, equal_nan=True) if mine.is_floating_point() else torch.equal(mine, target)
        if same:
            return
    got = describe_tensor(mine) if mine is not None else "none"
    raise UserError(
        f"{named} gives other samples than data.factory: expected the same targets in the same order, "
        f"{describe_tensor(target)}, got {got} with others; a target that is normalised anew each time is in other "
        "units each time: normalise it by constants"
    )


def _changed(found: Mapping[str, Tensor], validation: Mapping[str, Tensor]) -> int:
    """Samples of which an input differs from what the candidate is given."""
    different = torch.zeros(len(validation["target"]), dtype=torch.bool)
    for name, tensor in found.items():
        other = validation.get(name)
        if name.startswith(PREFIX) and not same_values(tensor, other):
            if other is None or tensor.shape != other.shape or tensor.dtype != other.dtype:
                return len(different)
            # Numbers of a fit may have been written in decimals.
            close = tensor.is_floating_point()
            differs = ~torch.isclose(tensor, other, rtol=1e-4, equal_nan=True) if close else tensor != other
            different |= differs.flatten(1).any(1) if differs.dim() > 1 else differs
    return int(different.sum())

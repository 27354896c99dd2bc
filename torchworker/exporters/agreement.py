"""Does a captured program give what the model gives? A first look, before the clean room's long one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchworker.exporters.subject import Subject
from torchworker.parity.probes import is_mask
from torchworker.parity.rule import compare_tensors
from torchworker.process.failure import UserError, describe
from torchworker.project.answers import roundoff_of
from torchworker.project.signature import BATCH, other_sizes, resized, sizes_of
from torchworker.project.user_code import forward, name_outputs
from torchworker.runtimes.load import Call


def disagreement(call: Call, subject: Subject) -> str:
    """Where the program differs from the model, in words: other batches and sizes, single samples. Empty: nowhere."""
    roundoff = roundoff_of(subject.model)
    for inputs in cases(subject):
        try:
            expected = name_outputs(forward(subject.model, inputs, subject.project), subject.project)
        except UserError:
            # Cutting may have broken what belongs together.
            continue
        shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        try:
            got = call({name: tensor.clone() for name, tensor in inputs.items()})
        except Exception as error:
            return f"on {shown} it fails, and the model does not: {describe(error).splitlines()[0]}"
        if len(got) != len(expected):
            return f"on {shown} it gives {len(got)} outputs, and the model {len(expected)}"
        for (name, tensor), found in zip(expected.items(), got, strict=True):
            outcome = compare_tensors(found, tensor, None, roundoff=roundoff)
            if not outcome.passed:
                return f"on {shown} output {name} is not the model's: {outcome.note}"
    return ""


def differs_without_tokens(call: Call, subject: Subject) -> bool:
    """Whether the program gives something else to a sample whose mask keeps nothing, all inputs else as they are."""
    roundoff = roundoff_of(subject.model)
    for name, tensor in subject.inputs.items():
        if tensor.dim() < 2 or not is_mask(tensor):
            continue
        mask = tensor.clone()
        mask[0] = 0
        inputs = {**subject.inputs, name: mask}
        expected = name_outputs(forward(subject.model, inputs, subject.project), subject.project)
        for found, wanted in zip(call(inputs), expected.values(), strict=True):
            if bool(wanted.isfinite().all()) and not compare_tensors(found, wanted, None, roundoff=roundoff).passed:
                return True
    return False


def hides_nan(call: Call, subject: Subject) -> str:
    """Where NaN goes in, the model gives NaN and the program numbers, in words. Empty: nowhere.

    Kernels that compilers and backends fuse, such as a convolution with the activation behind it, may do so.
    """
    for name, tensor in subject.inputs.items():
        if tensor.is_floating_point():
            inputs = {**subject.inputs, name: torch.full_like(tensor, float("nan"))}
            expected = name_outputs(forward(subject.model, inputs, subject.project), subject.project)
            for found, wanted in zip(call(inputs), expected.values(), strict=True):
                if bool(wanted.isnan().any()) and not bool(found.isnan().any()):
                    return f"NaN in {name} gives numbers, where the model gives NaN"
    return ""


def cases(subject: Subject) -> Iterator[dict[str, Tensor]]:
    """The example inputs, the same at other sizes, and single samples."""
    rows = sizes_of(subject.inputs, subject.dims)[BATCH]
    smallest = {dim.name: dim.min for dim in subject.dims}
    largest = {dim.name: dim.max for dim in subject.dims if dim.max is not None}
    yield dict(subject.inputs)
    for sizes in (other_sizes(subject.inputs, subject.dims), {BATCH: 2 * rows + 1, **largest}, smallest):
        yield resized(subject.inputs, subject.dims, sizes)
    for row in (0, rows - 1):
        yield {name: tensor[row : row + 1] for name, tensor in subject.inputs.items()}

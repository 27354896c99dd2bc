"""What the user's model says to a batch of inputs: as it is, in float64, and perturbed by its own rounding."""

from __future__ import annotations

import copy
import itertools
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.user_code import copied, forward, name_outputs
from torchworker.project.weights import values_of

LARGEST_DOUBLE = 2**31
"""Bytes of a model's copy in float64 that are kept in memory."""
Tensors = dict[str, Tensor]
"""Inputs or outputs by name, [batch, …]."""


class Answers:
    """What the model says to a question: as it is, in float64, and with everything perturbed by its own rounding."""

    def __init__(self, model: nn.Module, project: Project, folder: Path | None = None) -> None:
        """
        Args:
            model: in eval mode.
            project: for messages.
            folder: on a disk, for the weights of a large model in float64 as long as they are needed; None keeps all in
                memory.
        """
        self.model, self.project = model, project
        self._folder = folder
        self.fixed_precision = False
        """Whether the model was found not to run in float64."""
        self.double: nn.Module | None = None
        """The model in float64, once it was asked."""
        self._perturbed: nn.Module | None = None
        self._sorts = True
        """Whether topk or sort was met when last looked for."""

    def eager(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs by name, as it is. Raises UserError when it refuses the inputs."""
        return self._ask(self.model, inputs)

    def exact(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs in float64, or nothing when the model fixes a precision inside."""
        if self.fixed_precision:
            return {}
        try:
            self.double = self.double or in_float64(self.model, self._folder)
            outputs = self._ask(self.double, doubled(inputs))
        except (UserError, RuntimeError, TypeError):
            self.fixed_precision = True
            return {}
        # Of a model of 8 or 11 bits, outputs that it turns into float32 at its end are as good as float64.
        enough = (torch.float64, torch.float32) if roundoff_of(self.model) else (torch.float64,)
        if any(tensor.is_floating_point() and tensor.dtype not in enough for tensor in outputs.values()):
            self.fixed_precision = True
            return {}
        return doubled(outputs)

    def perturbed(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs when each weight and input is perturbed, up or down by half a unit in the last place, at random."""
        generator = torch.Generator().manual_seed(0)
        try:
            if self._perturbed is None:
                self._perturbed = copy.deepcopy(self.model)
                for tensor in [*self._perturbed.parameters(), *self._perturbed.buffers()]:
                    tensor.copy_(_perturbed(tensor, generator))
            nudged = {name: _perturbed(tensor, generator) for name, tensor in inputs.items()}
            return self._ask(self._perturbed, nudged)
        except (UserError, RuntimeError, TypeError):
            return {}

    def tied(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Whole numbers and booleans among the outputs when topk and sort take equal values in another order.

        Where they differ from `exact` (from `eager`, where the model does not run in float64) the model says nothing:
        values are equal. Empty when nothing is sorted; a model that sorts nothing the first time is not asked again,
        which would cost as much as its answers do.
        """
        if not self._sorts:
            return {}
        order = _OtherOrder()
        try:
            with order:
                if self.double is None or self.fixed_precision:
                    outputs = self.eager(inputs)
                else:
                    outputs = self._ask(self.double, doubled(inputs))
        except (UserError, RuntimeError, TypeError):
            return {}
        self._sorts = order.met
        return {name: found for name, found in outputs.items() if order.met and not found.is_floating_point()}

    def _ask(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        return name_outputs(copied(forward(model, inputs, self.project)), self.project)


def roundoff_of(model: nn.Module) -> float:
    """Unit roundoff of a model with parameters in bfloat16 (2^-8) or float16 (2^-11), the coarser if it has both; 0 of
    any other, which rounds as its outputs' dtype does.
    """
    half = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    return max((torch.finfo(dtype).eps / 2 for dtype in half), default=0.0)


def in_float64(model: nn.Module, folder: Path | None) -> nn.Module:
    """A copy of a model in float64; what would be more than LARGEST_DOUBLE bytes lies in a file without a name.

    Pages of a file are dropped and read again when memory is short. Where the file cannot be written, memory has to do.

    folder: where to; None for memory.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    if folder is None or 8 * sum(tensor.numel() for tensor in tensors.values()) <= LARGEST_DOUBLE:
        return copy.deepcopy(model).double()
    copies: dict[int, Any] = {}
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        for tensor in tensors.values():
            file.write(values_of(tensor).double().flatten().numpy().data)
        file.flush()
        # Private: what a forward writes into its weights is its own.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        ends = itertools.accumulate(tensor.numel() for tensor in tensors.values())
        values = torch.frombuffer(mapped, dtype=torch.float64)
        for (name, tensor), end in zip(tensors.items(), ends, strict=True):
            double = values[end - tensor.numel() : end].view(tensor.shape)
            copies[name] = nn.Parameter(double, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else double
    return copy.deepcopy(model, copies).double()


class _OtherOrder(TorchFunctionMode):
    """Within it topk, sort and argsort take what is equal in another order; a stable sort says what comes first."""

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        order = _SORTING.get(getattr(func, "__name__", ""))
        if order is None:
            return found
        given = {**dict(zip(order, args, strict=False)), **(kwargs or {})}
        values = given.get("input", given.get("self"))
        if not isinstance(values, Tensor) or not values.dim() or given.get("stable") or "out" in given:
            return found
        self.met = True
        descending = given.get("largest", True) if "largest" in order else given.get("descending", False)
        places = found if isinstance(found, Tensor) else found[1]
        other = _rotated(values, places, given.get("dim", -1), descending)
        return other if isinstance(found, Tensor) else type(found)((found[0], other))


_SORTING = {
    "topk": ("input", "k", "dim", "largest", "sorted"),
    "sort": ("input", "dim", "descending"),
    "argsort": ("input", "dim", "descending"),
}
"""Positional arguments."""


def _rotated(values: Tensor, places: Tensor, dim: int, descending: bool) -> Tensor:
    """The places that topk or sort took, each that ties replaced by the next with the same value.

    Args:
        values: that were sorted, [..., n, ...].
        places: of those that were taken, int64 [..., k, ...].
        dim: that was sorted.
        descending: the largest first.
    """
    values, places = values.movedim(dim, -1), places.movedim(dim, -1)
    size, taken = values.shape[-1], places.shape[-1]
    # All of them in order, of equal ones those first that were taken.
    number = torch.arange(size).expand(values.shape)
    first = (number + taken).scatter(-1, places, number[..., :taken]).argsort(-1)
    order = first.gather(-1, values.gather(-1, first).sort(dim=-1, descending=descending, stable=True).indices)
    ranked = values.gather(-1, order)
    starts = torch.ones_like(ranked, dtype=torch.bool)
    starts[..., 1:] = ranked[..., 1:] != ranked[..., :-1]
    start = torch.where(starts, number, 0).cummax(-1).values
    following = torch.where(starts.roll(-1, -1), order.gather(-1, start), order.roll(-1, -1))
    # starts[0] is set, so the last one goes back to its first.
    return following.gather(-1, order.argsort(-1).gather(-1, places)).movedim(-1, dim)


def same_values(first: Tensor, second: Tensor | None) -> bool:
    """Whether dtype, shape and every value are the same, NaN being one of the values.

    Args:
        first: of any shape and dtype.
        second: on the same device; None is another one than all.
    """
    if second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    # NaN is not equal to itself.
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())


def doubled(inputs: Mapping[str, Tensor]) -> Tensors:
    """The same with float64 for every floating point tensor."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _perturbed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator).mul(2).sub(1).to(tensor.device)
    return (tensor.double() * (1 + signs * torch.finfo(tensor.dtype).eps / 2)).to(tensor.dtype)

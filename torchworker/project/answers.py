"""What the user's model says to a batch of inputs: as it is, in float64, and perturbed by its own rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.streamed import in_double, is_streamed
from torchworker.project.user_code import copied, forward, name_outputs

Tensors = dict[str, Tensor]
"""Inputs or outputs by name, [batch, …]."""
DRAWS = 3
"""How often `Answers.noisy` asks: as many as stochastic arithmetic does (Vignes, "A stochastic arithmetic for reliable
scientific computation", Mathematics and Computers in Simulation 35, 1993)."""


class Answers:
    """What the model says to a question: as it is, in float64, and with everything perturbed by its own rounding."""

    def __init__(self, model: nn.Module, project: Project) -> None:
        self.model, self.project = model, project
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
            self.double = self.double or in_double(self.model)
            outputs = self._in_double(self.double, inputs)
            if outputs is None and is_streamed(self.double):
                # Code that writes into a weight, or looks into its memory, takes a copy.
                self.double = copy.deepcopy(self.model).double()
                outputs = self._in_double(self.double, inputs)
        except TypeError:
            outputs = None
        self.fixed_precision = outputs is None
        return outputs or {}

    def _in_double(self, double: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors | None:
        """Outputs in float64; None where a precision is fixed inside."""
        try:
            outputs = self._ask(double, doubled(inputs))
        except (UserError, RuntimeError, TypeError):
            return None
        # Of a model of 8 or 11 bits, outputs that it turns into float32 at its end are as good as float64.
        enough = (torch.float64, torch.float32) if roundoff_of(self.model) else (torch.float64,)
        if any(tensor.is_floating_point() and tensor.dtype not in enough for tensor in outputs.values()):
            return None
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

    def noisy(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Floating point outputs in float64 when every operation is off by up to the model's unit roundoff, at random:
        of DRAWS answers, for each element the one furthest from `exact`. Empty where the model does not run in float64.

        What a computation loses in float32, also where eager is exact by luck: of a flat picture all numbers of a
        channel are rounded the same way, and leave a normalisation nothing to enlarge; another kernel's do. Monte Carlo
        arithmetic: Parker, "Monte Carlo arithmetic: exploiting randomness in floating-point arithmetic", UCLA, 1997.
        """
        exact = self.exact(inputs)
        furthest = {name: tensor for name, tensor in exact.items() if tensor.is_floating_point()}
        roundoff = roundoff_of(self.model) or torch.finfo(torch.float32).eps / 2
        for seed in range(DRAWS if furthest else 0):
            assert self.double is not None, "exact made it"
            try:
                with _Noise(roundoff, seed):
                    outputs = self._ask(self.double, {name: tensor.clone() for name, tensor in doubled(inputs).items()})
            except (UserError, RuntimeError, TypeError):
                return {}
            if any(outputs[name].shape != tensor.shape for name, tensor in furthest.items()):
                return {}
            for name, known in furthest.items():
                further = (outputs[name] - exact[name]).abs() > (known - exact[name]).abs()
                furthest[name] = torch.where(further, outputs[name], known).double()
        return furthest

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


class _Noise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it what an operation computes in float64 is off by up to `roundoff` of itself, at random."""

    def __init__(self, roundoff: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._roundoff, self._generator = roundoff, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves((args, kwargs))):
            # What is made of whole numbers (positions) is exact; a view is what it looks at, which was rounded before.
            for said, tensor in zip(func._schema.returns, tree_leaves(found), strict=False):
                owned = said.alias_info is None or said.alias_info.is_write
                if owned and isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                    noise = torch.rand(tensor.shape, generator=self._generator, dtype=torch.float64)
                    tensor.mul_(1 + (2 * noise - 1) * self._roundoff)
        return found


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

"""What the user's model says to a batch of inputs: as it is, in float64, and perturbed by its own rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.user_code import copied, forward, name_outputs

Tensors = dict[str, Tensor]
"""Inputs or outputs by name, [batch, …]."""


class Answers:
    """What the model says to a question: as it is, in float64, and with everything perturbed by its own rounding."""

    def __init__(self, model: nn.Module, project: Project) -> None:
        self.model, self.project = model, project
        self.fixed_precision = False
        """Whether the model was found not to run in float64."""
        self.double: nn.Module | None = None
        """The model in float64, once it was asked."""
        self._perturbed: nn.Module | None = None

    def eager(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs by name, as it is. Raises UserError when it refuses the inputs."""
        return self._ask(self.model, inputs)

    def exact(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs in float64, or nothing when the model fixes a precision inside."""
        if self.fixed_precision:
            return {}
        try:
            self.double = self.double or copy.deepcopy(self.model).double()
            outputs = self._ask(self.double, doubled(inputs))
        except (UserError, RuntimeError, TypeError):
            self.fixed_precision = True
            return {}
        if any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in outputs.values()):
            self.fixed_precision = True
            return {}
        return outputs

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

    def _ask(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        return name_outputs(copied(forward(model, inputs, self.project)), self.project)


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

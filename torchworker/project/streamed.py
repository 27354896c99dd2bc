"""A model in float64 without a second copy of its weights: what reads one gets it in float64, and drops it.

A copy in float64 is twice as large as the model. What lies in the modules instead is a tensor that says it is float64,
so that code which asks a weight for its dtype goes the same way as with a copy, and that holds the weight as it is.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchworker.project.weights import is_large

COPIED = (torch.jit.ScriptModule, nn.RNNBase)
"""Modules that are copied whatever their size: one gives its weights to nobody, the other reads them at every step."""


class WrittenError(RuntimeError):
    """A weight or buffer would be written into, which is of use only in a copy."""


class Streamed(Tensor):
    """A weight [any shape], float64 to whoever asks, which every operator gets as a tensor of float64."""

    held: Tensor
    """The model's own."""
    # Nothing is done where PyTorch's functions are called, only where their operators are.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Streamed:
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=torch.float64, device=held.device
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held
        # isinstance(weight, nn.Parameter) goes by it.
        self._is_param = isinstance(held, nn.Parameter)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = itertools.zip_longest(func._schema.arguments, args)
        if any(isinstance(value, Streamed) and asked.alias_info is not None and asked.alias_info.is_write
               for asked, value in given if asked is not None):  # fmt: skip
            raise WrittenError(f"{func} writes into a weight or buffer")
        return func(*_read(args), **_read(kwargs or {}))


def _read(given: Any) -> Any:
    return tree_map_only(Streamed, lambda weight: weight.held.double(), given)


def in_double(model: nn.Module) -> nn.Module:
    """The model in float64: a copy of a small one, of a large one its modules around weights that are streamed.

    Args:
        model: on the CPU; stays as it is.

    Returns:
        Another model, whose caches and attributes are its own. Whoever writes into a streamed weight gets WrittenError.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    shared = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not is_large(model) or any(isinstance(module, COPIED) for module in model.modules()):
        return copy.deepcopy(model).double()
    # In every place where the model has the tensor, lists of its own among them; tied weights stay one.
    return copy.deepcopy(model, {id(tensor): Streamed(tensor) for tensor in shared})


def is_streamed(model: nn.Module) -> bool:
    """Whether `in_double` made it without a copy of its weights."""
    return any(isinstance(tensor, Streamed) for tensor in itertools.chain(model.parameters(), model.buffers()))

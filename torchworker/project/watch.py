"""What a forward pass does beside computing: it draws random numbers, or decides in Python by values of tensors."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchworker.contract import Project
from torchworker.process.failure import UserError, is_theirs
from torchworker.project.user_code import forward

_aten = torch.ops.aten
_READS = frozenset({_aten._local_scalar_dense.default, _aten.nonzero.default, _aten._unique2.default})
"""Operators that bring values to Python, or make shapes of them."""
_FUNCTIONAL = nn.functional.__file__


class Place(NamedTuple):
    """Where in a model something was done."""

    module: str
    """Its name in the model; empty for the model itself, and for what no module of it does."""
    kind: str
    """Its class."""
    line: str
    """`net.py:12, in forward: x = F.dropout(x)`; empty when it is no line of the user's."""
    dropout: bool
    """Whether it was dropout."""

    def __str__(self) -> str:
        parts = [self.line, f"module {self.module} ({self.kind})" if self.module else self.kind]
        return ", ".join(part for part in parts if part)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around a forward pass: the places where it drew and where it decided, the first one first.

    What such a mode cannot see into, as torch.cond, fails inside.
    """

    def __init__(self, model: nn.Module, folder: str) -> None:
        """folder: where the user's code is."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._folder = Path(folder)
        self._random: dict[Any, bool] = {}
        self.draws: list[Place] = []
        self.decisions: list[Place] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch asks here, with False: to keep its compiler out of this it would import it, for more than a second.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._random:
            self._random[func] = torch.Tag.nondeterministic_seeded in func.tags
        if self._random[func] and _draws(func, args, kwargs or {}):
            self.draws.append(self._place(func))
        elif func in _READS:
            self.decisions.append(self._place(func))
        return func(*args, **(kwargs or {}))

    def _place(self, func: Any) -> Place:
        module, kind, line = "", "", ""
        dropout = "dropout" in func.name() or _is_attention(func)
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and not (line and kind):
            code = frame.f_code
            if code.co_filename == _FUNCTIONAL and "dropout" in code.co_name:
                dropout = True
            if not line and is_theirs(code.co_filename, self._folder):
                source = linecache.getline(code.co_filename, frame.f_lineno).strip()
                name = Path(code.co_filename).relative_to(self._folder)
                line = f"{name}:{frame.f_lineno}, in {code.co_name}: {source}"
            owner = frame.f_locals.get("self")
            if not kind and id(owner) in self._names and isinstance(owner, nn.Module):
                module, kind = self._names[id(owner)], type(owner).__name__
            frame = frame.f_back
        # Written in C, and on a CPU made of other operators: no frame says it.
        dropout = dropout or "scaled_dot_product" in line
        return Place(module, kind, line, dropout)


def watched(model: nn.Module, inputs: Any, project: Project) -> Watch | None:
    """A forward pass, watched; None when it fails.

    Args:
        model: in whichever mode.
        inputs: of one batch as the data gives them, on the model's device.
        project: for messages.
    """
    watch = Watch(model, project.folder)
    try:
        with watch:
            forward(model, inputs, project)
    except UserError:
        if "torch._dynamo" in sys.modules:
            # torch.cond is compiled, and what did not compile because of the watching would be remembered.
            sys.modules["torch._dynamo"].reset()
        return None
    return watch


def _is_attention(func: Any) -> bool:
    return "scaled_dot_product" in func.name()


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention is an operator that may draw, and does so only with dropout."""
    if not _is_attention(func):
        return True
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[position] if position < len(args) else kwargs.get("dropout_p", 0.0))
    return True

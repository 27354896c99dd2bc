"""What a forward pass does beside computing: it draws, decides in Python by values, or writes into the model."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchworker.contract import Project
from torchworker.process.failure import UserError, is_theirs
from torchworker.project.user_code import forward

_aten = torch.ops.aten
_READS = frozenset({_aten._local_scalar_dense.default, _aten.nonzero.default, _aten._unique2.default})
"""Operators that bring values to Python, or make shapes of them."""
_FUNCTIONAL = nn.functional.__file__
_MOST_ANSWERS = 8
"""Decisions by yes or no of which the other answer is tried, in one forward pass each."""
_TIMES_LONGER = 4
"""Such a pass is given up when it makes so many times as many calls: it may not come to an end."""


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
    """Around a forward pass: the places where it drew, decided and wrote into the model, the first one first.

    What such a mode cannot see into, as torch.cond, fails inside.
    """

    def __init__(self, model: nn.Module, folder: str) -> None:
        """folder: where the user's code is."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._folder = Path(folder)
        self._random: dict[Any, bool] = {}
        named = [*model.named_parameters(), *model.named_buffers()]
        # Not by identity: torch writes through `detach()` and `.data`, which are other objects on the same memory.
        self._owned = {memory: name for name, tensor in named if (memory := _memory(tensor)) is not None}
        self.draws: list[Place] = []
        self.decisions: list[Place] = []
        self.answers = 0
        """How many of the decisions are by one yes or no."""
        self.writes: dict[str, Place] = {}
        """Where each parameter or buffer was written into first, by its name."""

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
            self.answers += _is_answer(func, args)
        elif func._schema.is_mutable:
            self._note_writes(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.is_write and (memory := _memory(given)) in self._owned:
                self.writes.setdefault(self._owned[memory], self._place(func, 3))

    def _place(self, func: Any, above: int = 2) -> Place:
        module, kind, line = "", "", ""
        dropout = "dropout" in func.name() or _is_attention(func)
        frame: FrameType | None = sys._getframe(above)
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
    return watch if _failure(watch, model, inputs, project) is None else None


class _Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around a forward pass: which parameters were given to an operator. One answer may be turned round."""

    def __init__(self, model: nn.Module, turned: int | None, most: int) -> None:
        """
        Args:
            model: whose parameters.
            turned: which of the decisions by yes or no gets the other answer; None for none.
            most: calls of operators.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._of = {memory: name for name, item in model.named_parameters() if (memory := _memory(item)) is not None}
        self._turned, self._most, self._seen = turned, most, 0
        self.calls = 0
        self.parameters: set[str] = set()
        self.failed: BaseException | None = None
        """What the pass ended with, if not with its end."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self._most:
            raise RuntimeError("it does not come to an end")
        given = tree_leaves((args, kwargs))
        self.parameters |= {self._of[memory] for item in given if (memory := _memory(item)) in self._of}
        answer = func(*args, **(kwargs or {}))
        if _is_answer(func, args):
            self._seen += 1
            return not answer if self._seen - 1 == self._turned else answer
        return answer


@torch.no_grad()
def decides_on_parameters(watch: Watch, model: nn.Module, inputs: Any, project: Project) -> bool:
    """Whether what forward decided may be which parameters take part in a step; True where that cannot be told.

    A mask of padding that is left out when there is no padding decides too, and uses the same parameters. So the other
    answer is tried of each decision by yes or no.

    Args:
        watch: of a forward pass on these inputs.
        model: a copy, in training mode.
        inputs, project: as `watched` takes them.
    """
    if not watch.decisions or watch.answers < len(watch.decisions) or watch.answers > _MOST_ANSWERS:
        return bool(watch.decisions)
    plain = _used(model, None, sys.maxsize, inputs, project)
    if plain.failed is not None or not plain.parameters:
        return True
    for turned in range(watch.answers):
        other = _used(model, turned, _TIMES_LONGER * plain.calls, inputs, project)
        # An assertion says that the other answer never is.
        never = isinstance(other.failed, AssertionError)
        if not never and (other.failed is not None or other.parameters != plain.parameters):
            return True
    return False


def _used(model: nn.Module, turned: int | None, most: int, inputs: Any, project: Project) -> _Used:
    """Of a forward pass that draws the same numbers each time."""
    used = _Used(model, turned, most)
    devices = {item.device.index for item in model.parameters() if item.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(0)
        used.failed = _failure(used, model, inputs, project)
    return used


def _failure(mode: TorchDispatchMode, model: nn.Module, inputs: Any, project: Project) -> BaseException | None:
    """What a forward pass within the mode ends with; None when it comes to its end."""
    try:
        with mode:
            forward(model, inputs, project)
    except UserError as mistake:
        if "torch._dynamo" in sys.modules:
            # torch.cond is compiled, and what did not compile because of the watching would be remembered.
            sys.modules["torch._dynamo"].reset()
        return mistake.__cause__ or mistake
    return None


def _memory(item: Any) -> int | None:
    """Where the values of a tensor lie, which its views share."""
    if not isinstance(item, Tensor) or item.layout != torch.strided or not item.numel():
        return None
    return int(item.untyped_storage().data_ptr())


def _is_answer(func: Any, args: Any) -> bool:
    return func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool


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

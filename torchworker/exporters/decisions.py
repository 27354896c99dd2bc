"""Which of torch's TracerWarnings matter: what Python decides on while torch.jit.trace records a model.

A trace records operations on tensors. What Python makes of a tensor's values, such as the side of an `if`, a number or
the turns of a loop, becomes a constant of the program. That is harmless where the value cannot be another one: where it
depends on weights only, or on sizes that are fixed, or its other side raises. torch warns in all of these cases alike.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchworker.process.failure import is_theirs

_LOOKS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__len__", "__iter__")
"""Methods of a tensor by which Python sees what is in it."""
_SIZES_ONLY = ("__len__", "__iter__")
"""Of these, the ones that see a size and no value."""
_MAKES = ("tensor", "as_tensor", "from_numpy")
"""Functions of torch by which Python's numbers become a constant of the program."""
_OF_SIZES = ("aten::size", "aten::numel", "aten::dim", "aten::_shape_as_tensor", "prim::shape")
_DATA_SHAPED = (
    "aten::nonzero", "aten::nonzero_numpy", "aten::argwhere", "aten::masked_select", "aten::_unique", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount",
)  # fmt: skip
"""Operators whose output is as large as the values of their inputs say."""
_AS_LARGE_AS_THE_FIRST = (
    "aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_put", "aten::masked_fill",
    "aten::masked_scatter", "aten::scatter", "aten::scatter_add", "aten::scatter_reduce",
)  # fmt: skip
"""Operators that write into a copy of their first input; those that write into it itself end with an underscore."""


class Reach(IntEnum):
    """What a value depends on."""

    CONSTANT = 0
    """Weights and numbers of the code."""
    SIZES = 1
    """Sizes of inputs too."""
    DATA = 2
    """Values of inputs too."""


@dataclass(frozen=True)
class Decision:
    """One value that the trace holds as a constant."""

    reach: Reach
    value: str
    place: tuple[str, int]
    """File and line where Python looked."""
    called_at: tuple[str, int] | None
    """The user's line that led there, where it is another."""
    said: str
    """What torch warned of."""

    def __str__(self) -> str:
        """`layers.py:12, called at model.py:31`."""
        places = [self.place, *([self.called_at] if self.called_at else [])]
        return ", called at ".join(f"{Path(filename).name}:{line}" for filename, line in places)

    def warning(self) -> warnings.WarningMessage:
        """As torch showed it."""
        return warnings.WarningMessage(self.said, torch.jit.TracerWarning, *self.place)  # type: ignore[attr-defined]


@dataclass
class Decisions:
    """All of one trace, in order."""

    found: list[Decision] = field(default_factory=list)

    def on_data(self) -> Decision | None:
        """The first that the values of inputs can turn, where both sides go on."""
        return next((one for one in self.found if one.reach is Reach.DATA and not other_side_raises(one)), None)

    def on_sizes(self) -> list[Decision]:
        """Those that sizes of inputs can turn, where both sides go on."""
        return [one for one in self.found if one.reach is Reach.SIZES and not other_side_raises(one)]

    def lost_looks(self) -> bool:
        """Whether any refuses sizes of inputs, which a trace no longer does."""
        return any(one.reach is Reach.SIZES and other_side_raises(one) for one in self.found)


@contextlib.contextmanager
def watched(folder: str) -> Iterator[Decisions]:
    """What Python makes of tensors meanwhile, wherever torch.jit.trace warns of it. folder: of the user's code."""
    decisions = Decisions()
    with contextlib.ExitStack() as stack:
        for owner, names in ((Tensor, _LOOKS), (torch, _MAKES)):
            for name in names:
                original = getattr(owner, name)
                # Most methods are those of a base class.
                stack.callback(*((setattr, owner, name, original) if name in vars(owner) else (delattr, owner, name)))
                setattr(owner, name, _looking(original, name, decisions, folder))
        yield decisions


def other_side_raises(decision: Decision) -> bool:
    """An assertion, or an `if` that only raises: the trace was made, so what was not taken would have ended it."""
    return is_assertion(*decision.place)


def is_assertion(filename: str, line: int) -> bool:
    """Whether the condition at a line is that of an assertion, or of an `if` that does nothing but raise."""
    conditions = [one for one in _conditions(filename) if one.first <= line <= one.last]
    return len(conditions) == 1 and conditions[0].raises


def first_difference(one: Sequence[Decision], other: Sequence[Decision]) -> tuple[Decision, str] | None:
    """The first of one trace's decisions that is another in a second trace, and what it is there."""
    for mine, theirs in zip(one, other, strict=False):
        if mine.place != theirs.place:
            return mine, "not asked"
        if mine.value != theirs.value:
            return mine, theirs.value
    if len(one) > len(other):
        return one[len(other)], "not asked"
    if len(other) > len(one):
        return other[len(one)], "asked"
    return None


def _looking(original: Callable[..., Any], name: str, decisions: Decisions, folder: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def look(*args: Any, **kwargs: Any) -> Any:
        if torch._C._get_tracing_state() is None:
            return original(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        reach = max((_reach(tensor, name in _SIZES_ONLY) for tensor in tensors), default=Reach.CONSTANT)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = original(*args, **kwargs)
            if name == "__iter__":
                result = list(result)
        said = [one for one in caught if issubclass(one.category, torch.jit.TracerWarning)]  # type: ignore[attr-defined]
        # A tensor that was asked for as a tensor is what it was.
        if said and result is not args[0]:
            frame = sys._getframe(1)
            value = _shown(len(result) if name == "__iter__" else result)
            decisions.found.append(Decision(reach, value, *_places(frame, folder), str(said[0].message)))
        return iter(result) if name == "__iter__" else result

    return look


def _places(frame: FrameType, folder: str) -> tuple[tuple[str, int], tuple[str, int] | None]:
    """Of a frame, and of the first above it that is in the user's folder, if it is another."""
    place = frame.f_code.co_filename, frame.f_lineno
    above: FrameType | None = frame
    while above is not None and not is_theirs(above.f_code.co_filename, Path(folder)):
        above = above.f_back
    return place, (above.f_code.co_filename, above.f_lineno) if above is not None and above is not frame else None


def _shown(value: Any) -> str:
    # What is only shown is no part of the trace.
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return str(value.tolist() if hasattr(value, "tolist") else value)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _reach(tensor: Tensor, of_size: bool) -> Reach:
    """What a tensor, or its size, was made of, by the operations that are recorded up to now."""
    reach, seen = Reach.CONSTANT, set()
    left = [(torch._C._get_value_trace(tensor), of_size)]  # type: ignore[attr-defined]
    while left:
        value, size = left.pop()
        if (value.debugName(), size) in seen:
            continue
        seen.add((value.debugName(), size))
        node = value.node()
        kind, inputs = node.kind(), list(node.inputs())
        if kind == "prim::Param":
            # The module itself is one too: its weights are constants.
            if _is_tensor(value):
                reach = max(reach, Reach.SIZES if size else Reach.DATA)
        elif size and (kind.endswith("_") or kind in _AS_LARGE_AS_THE_FIRST):
            left.append((inputs[0], True))
        elif size and _is_data_shaped(kind, inputs):
            return Reach.DATA
        else:
            # A size is made of sizes of tensors, and of numbers.
            of_first = kind in _OF_SIZES or kind.endswith("_like") or kind.startswith("aten::new_")
            left += [
                (one, (size and _holds_tensors(one)) or (of_first and place == 0)) for place, one in enumerate(inputs)
            ]
    return reach


def _is_data_shaped(kind: str, inputs: Sequence[Any]) -> bool:
    if kind == "aten::index":
        # By a mask.
        return any(one.type().scalarType() == "Bool" for one in inputs[1].node().inputs() if _is_tensor(one))
    # Of an operator of somebody else nobody knows.
    return kind in _DATA_SHAPED or not kind.startswith(("aten::", "prim::"))


def _holds_tensors(value: Any) -> bool:
    kind = value.type().kind()
    return kind in ("TensorType", "TupleType", "OptionalType") or (
        kind == "ListType" and value.type().getElementType().kind() == "TensorType"
    )


def _is_tensor(value: Any) -> bool:
    return bool(value.type().kind() == "TensorType")


class _Condition(NamedTuple):
    first: int
    last: int
    """Lines from, to."""
    raises: bool
    """Whether one of its sides does nothing but raise."""


@functools.cache
def _conditions(filename: str) -> Sequence[_Condition]:
    """All that are asked in a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(_lines(node.test, True))
        elif isinstance(node, ast.If):
            *before, last = node.body
            found.append(
                _lines(
                    node.test,
                    isinstance(last, ast.Raise) and all(isinstance(one, ast.Assign | ast.Expr) for one in before),
                )
            )
        elif isinstance(node, ast.While | ast.IfExp):
            found.append(_lines(node.test, False))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch._assert", "torch._check") and node.args:
            found.append(_lines(node.args[0], True))
    return found


def _lines(test: ast.expr, raises: bool) -> _Condition:
    return _Condition(test.lineno, test.end_lineno or test.lineno, raises)

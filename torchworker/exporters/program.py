"""torch.export, the hub: pt2, ONNX and AOTInductor artifacts are made from the program captured here.

Dim.DYNAMIC makes torch refuse a dimension that it had to fix at one number; Dim.AUTO would fix it silently. It
still narrows ranges silently and leaves conditions on sizes behind, so both are held against what was declared.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import PackedSequence

from torchworker.exporters.elman import loops
from torchworker.exporters.subject import Subject
from torchworker.process.failure import UserError, describe, is_theirs, user_line
from torchworker.project.signature import resized, sizes_of
from torchworker.project.user_code import arguments, forward

WAYS_OUT = (
    "Ways out for a decision on data: torch.cond, torch's while_loop, or a fixed number of steps with a mask; "
    "TorchScript by script keeps Python's control flow"
)
PACKED = (
    "A packed sequence has the lengths of one batch in its shape: call the layer on the padded batch and take what it "
    "says at each sample's last step (torch.gather), which is the same for one direction, or mask what follows; "
    "TorchScript by script takes packed sequences"
)
MADE_OF_IT = "onnx, pt2, aoti and executorch"
"""Formats that are made of an exported program."""
LARGEST_TRIED = 64
"""Sizes of a dimension are tried one by one up to its smallest plus this, and at its largest."""


@dataclass(frozen=True)
class _Way:
    """One way to capture."""

    strict: bool
    oblivious: bool
    """Do not assume that sizes differ from 1: the program then holds at batch 1, not only by chance."""
    patched: bool = False
    """LSTM, GRU and RNN as loops over a length that is not known at capture."""

    def __str__(self) -> str:
        words = ["strict" if self.strict else "non-strict", *(["with recurrent loops"] if self.patched else [])]
        return ", ".join(words)


_WAYS = tuple(_Way(strict, oblivious) for oblivious in (True, False) for strict in (False, True))
_RECURRENT = _Way(strict=False, oblivious=False, patched=True)


class _Guards(logging.Handler):
    """Every condition on sizes that torch takes for granted while it captures, with the user's line."""

    def __init__(self, project_folder: str) -> None:
        super().__init__(logging.INFO)
        self.symbols: dict[str, str] = {}
        """`s27` to `tokens.size()[1]`."""
        self.found: list[str] = []
        self._project_folder = project_folder

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if made := re.match(r"create_symbol (\w+) = \S+ for (L\S+)", text):
            self.symbols[made[1]] = made[2]
        elif taken := re.match(r"eval (.+?) \[guard added\]", text):
            self.found.append(f"{taken[1]}{self._place()}")

    def _place(self) -> str:
        frame: Any = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if is_theirs(code.co_filename, Path(self._project_folder)):
                name = Path(code.co_filename).relative_to(self._project_folder)
                source = linecache.getline(code.co_filename, frame.f_lineno).strip()
                return f" ({name}:{frame.f_lineno}, in {code.co_name}: {source})"
            frame = frame.f_back
        return ""


@dataclass(frozen=True)
class Captured:
    """An exported program that holds for every declared size."""

    program: ExportedProgram
    _way: _Way

    @property
    def method(self) -> str:
        """How it was captured, in words."""
        return f"torch.export, {self._way}"

    @contextlib.contextmanager
    def assuming(self) -> Iterator[None]:
        """For what is made from the program: assume no more about sizes than was assumed at capture."""
        with _settings(self._way):
            yield


def capture(subject: Subject) -> Captured:
    """The exported program and how it was made.

    Raises UserError when no way gives a program that holds for every declared size, with the user's line.
    """
    refusals: list[UserError] = []
    ways = [*_WAYS]
    if len(subject.dims) > 1 and any(isinstance(module, nn.RNNBase) for module in subject.model.modules()):
        # Usually unrolled over the length of the example.
        ways.insert(1, _RECURRENT)
    for way in ways:
        guards = _Guards(subject.folder)
        args, kwargs = arguments(subject.model, subject.inputs)
        try:
            with _settings(way), _listening(guards):
                program = torch.export.export(
                    subject.model, args, kwargs, dynamic_shapes=_shapes(subject), strict=way.strict
                )
        except Exception as error:
            refusals.append(_refused(subject, error, guards))
            if isinstance(error, GuardOnDataDependentSymNode):
                # A decision on data is one in every way.
                break
            continue
        try:
            _require_every_size(program, subject, guards)
        except UserError as refusal:
            refusals.append(refusal)
            continue
        return Captured(program, way)
    raise refusals[0]


def _shapes(subject: Subject) -> dict[str, dict[int, Any]]:
    shapes: dict[str, dict[int, Any]] = {name: {} for name in subject.inputs}
    for dim in subject.dims:
        for name, axes in dim.axes.items():
            for axis in axes:
                shapes[name][axis] = Dim.DYNAMIC(min=dim.min, max=dim.max)
    return shapes


@contextlib.contextmanager
def _settings(way: _Way) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(symbolic.patch(backed_size_oblivious=way.oblivious))  # type: ignore[attr-defined]
        if way.patched:
            from torch.export import _patches

            stack.enter_context(_patches.register_lstm_while_loop_decomposition())
            stack.enter_context(_patches.register_gru_while_loop_decomposition())
            for operator, layers in loops().items():
                stack.enter_context(_patches._register_rnn_while_loop_decomposition(operator, layers))
            for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input, *loops()):
                # An earlier attempt left the usual kernel in it.
                operator._dispatch_cache.clear()
                stack.callback(operator._dispatch_cache.clear)
        yield


@contextlib.contextmanager
def _listening(guards: _Guards) -> Iterator[None]:
    # The only place where torch says which line made it fix a size.
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(guards)
    try:
        yield
    finally:
        log.removeHandler(guards)
        log.setLevel(level)
        log.propagate = propagate


def _refused(subject: Subject, error: Exception, guards: _Guards) -> UserError:
    """What torch.export said, with the line, in the job file's words."""
    text = str(error).strip()
    fixed = re.findall(
        r"L\['?([^]']+?)'?\](?:\[(\d+)\])?\.size\(\)\[(\d+)\] as dynamic but .* constant \((\d+)\)", text
    )
    if fixed:
        names = list(subject.inputs)
        places = []
        for name, position, axis, size in fixed:
            tensor = names[int(position)] if name == "flat_args" else name
            places.append(f"{_dimension(subject, tensor, int(axis))} at {size}")
        mistake = UserError(
            f"export: torch.export fixes {', '.join(dict.fromkeys(places))}, the size of the example"
            f"{_because(subject, guards, r'^Eq')}; take sizes from the inputs (x.shape) instead of writing them down "
            f"or turning them into Python numbers, leave the dimension out of export.dynamic, or leave {MADE_OF_IT} "
            "out of export.formats"
        )
    else:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        mistake = UserError(
            f"export: torch.export cannot capture the model: {type(error).__name__}: {first}"
            f"{user_line(error, subject.folder)}. {PACKED if _is_packed(error) else WAYS_OUT}; or leave {MADE_OF_IT} "
            "out of export.formats"
        )
    mistake.__cause__ = error
    return mistake


def _is_packed(error: BaseException) -> bool:
    """Whether what failed had a PackedSequence at hand."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        frame.f_code.co_name == "pack_padded_sequence"
        or any(isinstance(value, PackedSequence) for value in frame.f_locals.values())
        for frame, _ in frames
    )


def _dimension(subject: Subject, tensor: str, axis: int) -> str:
    for dim in subject.dims:
        if axis in dim.axes.get(tensor, ()):
            return dim.name
    return f"axis {axis} of {tensor}"


def _because(subject: Subject, guards: _Guards, pattern: str = "") -> str:
    """` because of …`: the conditions that torch took for granted, in the job file's words, with the user's lines."""
    shown = []
    for guard in guards.found:
        if not re.search(pattern, guard):
            continue
        for symbol, source in guards.symbols.items():
            guard = re.sub(rf"\b{symbol}\b", _named_source(subject, source), guard)
        shown.append(guard)
    # Conditions with a line of the user's first.
    shown = sorted(dict.fromkeys(shown), key=lambda guard: " in " not in guard)[:3]
    return f", because of {'; '.join(shown)}" if shown else ""


def _named_source(subject: Subject, source: str) -> str:
    found = re.match(r"L\['?([^]']+?)'?\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]", source)
    if not found:
        return source
    name, position, axis = found.groups()
    tensor = list(subject.inputs)[int(position)] if name == "flat_args" else name
    return _dimension(subject, tensor, int(axis))


def _require_every_size(program: ExportedProgram, subject: Subject, guards: _Guards) -> None:
    """Raises UserError when the program refuses a size that was declared and that the model itself takes."""
    check = getattr(program.module(), "_guards_fn", None)
    if check is None:
        return
    limits = {name: upper for name, (_, upper) in ranges(program, subject).items() if upper is not None}
    for sizes in _declared_sizes(subject, limits):
        shapes = {
            name: torch.empty(_shape(subject, name, sizes), dtype=tensor.dtype, device="meta")
            for name, tensor in subject.inputs.items()
        }
        try:
            check(*shapes.values())
            continue
        except AssertionError as error:
            refused = str(error).removeprefix("Guard failed: ")
        tried = ", ".join(f"{name} {size}" for name, size in sizes.items())
        try:
            forward(subject.model, resized(subject.inputs, subject.dims, sizes), subject.project)
        except UserError as error:
            raise UserError(
                f"export.dynamic: the model itself fails at {tried}, which is inside the declared sizes: "
                f"{describe(error.__cause__ or error)}{user_line(error.__cause__ or error, subject.folder)}; "
                "declare the sizes that it takes (min, max)"
            ) from error
        raise UserError(
            f"export: torch.export keeps one side of a decision on sizes: at {tried} the model runs and the program "
            f"would refuse ({refused}){_because(subject, guards)}; declare narrower sizes in export.dynamic, make the "
            f"decision torch.cond, or leave {MADE_OF_IT} out of export.formats"
        )


def _shape(subject: Subject, name: str, sizes: Mapping[str, int]) -> list[int]:
    shape = list(subject.inputs[name].shape)
    for dim in subject.dims:
        for axis in dim.axes.get(name, ()):
            shape[axis] = sizes[dim.name]
    return shape


def ranges(program: ExportedProgram, subject: Subject) -> dict[str, tuple[int, int | None]]:
    """The smallest and the largest size that the program notes for each dimension; None where it has no limit."""
    found: dict[str, tuple[int, int | None]] = {}
    taken = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [taken[str(name)] for name in program.graph_signature.user_inputs]
    shapes = {name: tensor.shape for name, tensor in zip(subject.inputs, tensors, strict=True)}
    for dim in subject.dims:
        lower, upper = 0, sys.maxsize
        for name, axes in dim.axes.items():
            for axis in axes:
                size = shapes[name][axis]
                noted = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
                if noted is None:
                    # A number: the dimension was fixed.
                    lower, upper = max(lower, int(size)), min(upper, int(size))
                    continue
                lower = max(lower, int(noted.lower))
                upper = min(upper, int(noted.upper)) if noted.upper.is_Integer else upper
        found[dim.name] = (lower, upper if upper < sys.maxsize else None)
    return found


def _declared_sizes(subject: Subject, bounds: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """All corners of the declared ranges, then each dimension alone from its smallest size on.

    bounds: largest sizes that the program takes; where no limit is declared, one more is tried.
    """
    at_capture = sizes_of(subject.inputs, subject.dims)
    ends = {dim.name: (dim.min, dim.max or bounds.get(dim.name, 4 * LARGEST_TRIED) + 1) for dim in subject.dims}
    for corner in itertools.islice(itertools.product(*ends.values()), 256):
        yield dict(zip(ends, corner, strict=True))
    for dim in subject.dims:
        for size in range(dim.min, min(dim.min + LARGEST_TRIED, dim.max or sys.maxsize) + 1):
            yield {**at_capture, dim.name: size}

"""torch.export, the hub: pt2, ONNX and AOTInductor artifacts are made from the program captured here.

Dim.DYNAMIC makes torch refuse a dimension that it had to fix at one number; Dim.AUTO would fix it silently. It
still narrows ranges silently and leaves conditions on sizes behind, so both are held against what was declared.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.experimental import _config as symbolic
from torch.fx.experimental import proxy_tensor
from torch.nn.utils.rnn import PackedSequence

from torchworker.exporters.decisions import is_assertion
from torchworker.exporters.elman import loops
from torchworker.exporters.sizes import declared_sizes, ranges, shape_at, what_is_taken
from torchworker.exporters.subject import Subject
from torchworker.process.failure import UserError, describe, is_theirs, line_of, user_frames, user_line
from torchworker.project.outputs import is_plain
from torchworker.project.signature import BATCH, resized, sizes_of
from torchworker.project.user_code import arguments, forward, name_outputs

WAYS_OUT = (
    "Ways out for a decision on data: torch.cond, torch's while_loop, or a fixed number of steps with a mask; "
    "TorchScript by script keeps Python's control flow"
)
PACKED = (
    "A packed sequence has the lengths of one batch in its shape: call the layer on the padded batch and take what it "
    "says at each sample's last step (torch.gather), which is the same for one direction, or mask what follows; "
    "TorchScript by script takes packed sequences"
)
ASSERTS = (
    "An assertion on values cannot be captured: put it behind `if not torch.compiler.is_exporting():`, or check what "
    "goes in before the model; TorchScript leaves it out"
)
MADE_OF_IT = "onnx, pt2, aoti and executorch"
"""Formats that are made of an exported program."""
KNOWN_ELEMENTS = 1024
"""Constants of so many elements at most are followed."""


@dataclass(frozen=True)
class _Way:
    """One way to capture."""

    strict: bool
    oblivious: bool
    """Do not assume that sizes differ from 1: the program then holds at batch 1, not only by chance."""
    patched: bool = False
    """LSTM, GRU and RNN as loops over a length that is not known at capture."""
    constants: bool = False
    """What is computed of nothing but constants in forward (`torch.tensor([0.0, 1.0])`) may decide; torch follows those
    of one element."""

    def __str__(self) -> str:
        words = ["strict" if self.strict else "non-strict"]
        words += ["with recurrent loops"] * self.patched + ["with known constants"] * self.constants
        return ", ".join(words)


_WAYS = tuple(_Way(strict, oblivious) for oblivious in (True, False) for strict in (False, True))
_RECURRENT = _Way(strict=False, oblivious=False, patched=True)
_CONSTANTS = tuple(_Way(strict=False, oblivious=oblivious, constants=True) for oblivious in (True, False))


class _Guards(logging.Handler):
    """Every condition on sizes that torch takes for granted while it captures, with the user's line."""

    def __init__(self, project_folder: str) -> None:
        super().__init__(logging.INFO)
        self.symbols: dict[str, str] = {}
        """`s27` to `tokens.size()[1]`."""
        self.found: list[tuple[str, str]] = []
        """Conditions, each with its place."""
        self._project_folder = project_folder

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if made := re.match(r"create_symbol (\w+) = \S+ for (L\S+)", text):
            self.symbols[made[1]] = made[2]
        elif taken := re.match(r"eval (?!\[guard suppressed\])(.+?) \[guard added\]", text):
            self.found.append((taken[1], self._place()))

    def _place(self) -> str:
        # What called capture says nothing of the model.
        frames = itertools.takewhile(lambda item: item[0].f_code is not _exported.__code__, traceback.walk_stack(None))
        found = [(frame.f_code.co_filename, number, frame.f_code.co_name) for frame, number in frames]
        # Strict capture reads the user's code without running it, and keeps a stack of its own.
        read = [(line.filename, line.lineno or 0, line.name) for line in TracingContext.extract_stack()]
        return line_of([*reversed(read), *found], self._project_folder)


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


class _RefusedWayError(Exception):
    """One way to capture did not lead to a program."""

    def __init__(self, reached: int, mistake: UserError) -> None:
        super().__init__(str(mistake))
        self.reached, self.mistake = reached, mistake


# How far a way came. The last two led to a program that takes fewer sizes; of the last it can be said which.
_FAILED_BY_THE_WAY, _FAILED, _FIXED, _NARROWED, _LIMITED = range(5)


def capture(subject: Subject) -> Captured:
    """The exported program and how it was made.

    Its outputs are those of the model where they are tensors in Python's own tuples, lists and dicts; of any other
    class (transformers' ModelOutput, a dataclass) they are a dict, so that the program is read without that class.

    Raises UserError when no way gives a program that holds for every declared size: what is said of the way that got
    furthest, with the user's line.
    """
    refusals: list[_RefusedWayError] = []
    ways = [*_WAYS]
    if len(subject.dims) > 1 and any(isinstance(module, nn.RNNBase) for module in subject.model.modules()):
        # Usually unrolled over the length of the example.
        ways.insert(1, _RECURRENT)
    with _plain_outputs(subject):
        # Constants last, and only where decisions on data are all that is in the way: torch does not notice that one is
        # written over.
        for way in (*ways, *_CONSTANTS):
            if way.constants and any(refusal.reached > _FAILED for refusal in refusals):
                break
            try:
                return Captured(_captured(subject, way), way)
            except _RefusedWayError as refusal:
                refusals.append(refusal)
    raise max(refusals, key=lambda refusal: refusal.reached).mistake


def _captured(subject: Subject, way: _Way) -> ExportedProgram:
    """Raises _RefusedWayError when this way gives no program that holds for every declared size."""
    guards = _Guards(subject.folder)
    try:
        with _settings(way), _listening(guards):
            program = _exported(subject, way)
    except Exception as error:
        if (fixed := _fixed(subject, error, guards)) is not None:
            raise _RefusedWayError(_FIXED, fixed) from error
        # Each of these assumes of sizes or of modules what the model does not say.
        own = way in _WAYS and not way.oblivious
        raise _RefusedWayError(_FAILED if own else _FAILED_BY_THE_WAY, _failed(subject, error)) from error
    if way.constants and _writes_over_constants(program):
        raise _RefusedWayError(_FAILED_BY_THE_WAY, UserError("export: torch.export decides on what a constant was"))
    _require_every_size(program, subject, guards)
    return program


def _writes_over_constants(program: ExportedProgram) -> bool:
    """Whether something that is not known at capture is written into what is."""
    known: set[Node] = set()
    for node in program.graph.nodes:
        lifted = node.op == "placeholder" and node.name in program.graph_signature.inputs_to_lifted_tensor_constants
        if lifted or (node.all_input_nodes and known.issuperset(node.all_input_nodes)):
            known.add(node)
        elif isinstance(node.target, OpOverload):
            for place, argument in enumerate(node.target._schema.arguments):
                given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and isinstance(given, Node) and given in known:
                    return True
    return False


def _exported(subject: Subject, way: _Way) -> ExportedProgram:
    args, kwargs = arguments(subject.model, subject.inputs)
    return torch.export.export(subject.model, args, kwargs, dynamic_shapes=_shapes(subject), strict=way.strict)


@contextlib.contextmanager
def _plain_outputs(subject: Subject) -> Iterator[None]:
    """Within it the model gives tensors in Python's own classes. A hook leaves the names of its weights as they are."""
    if is_plain(forward(subject.model, subject.inputs, subject.project)):
        yield
        return
    handle = subject.model.register_forward_hook(lambda _, args, outputs: name_outputs(outputs, subject.project))
    try:
        yield
    finally:
        handle.remove()


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
        if way.constants:
            modules: tuple[Any, ...] = (fake_tensor, proxy_tensor)
            for module in modules:
                stack.callback(setattr, module, "CONSTANT_NUMEL_LIMIT", module.CONSTANT_NUMEL_LIMIT)
                module.CONSTANT_NUMEL_LIMIT = KNOWN_ELEMENTS
        if way.patched:
            from torch.export import _patches

            stack.enter_context(_patches.register_lstm_while_loop_decomposition())
            stack.enter_context(_patches.register_gru_while_loop_decomposition())
            for operator, layers in loops().items():
                stack.enter_context(_patches._register_rnn_while_loop_decomposition(operator, layers))
            for cells in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input, *loops()):
                # An earlier attempt left the usual kernel in it.
                cells._dispatch_cache.clear()
                stack.callback(cells._dispatch_cache.clear)
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


def _fixed(subject: Subject, error: Exception, guards: _Guards) -> UserError | None:
    """Which dimensions torch.export fixes, with the line, in the job file's words; None where it fails for another
    reason."""
    fixed = re.findall(
        r"L\['?([^]']+?)'?\](?:\[(\d+)\])?\.size\(\)\[(\d+)\] as dynamic but .* constant \((\d+)\)", str(error)
    )
    if not fixed:
        return None
    names = list(subject.inputs)
    places = {}
    for name, position, axis, size in fixed:
        places[_dimension(subject, names[int(position)] if name == "flat_args" else name, int(axis))] = size
    shown = ", ".join(f"{dimension} at {size}" for dimension, size in places.items())
    # The batch is declared by nobody.
    leave = "" if BATCH in places else "leave the dimension out of export.dynamic, "
    mistake = UserError(
        f"export: torch.export fixes {shown}, the size of the example{_because(subject, guards, r'^Eq')}; take sizes "
        f"from the inputs (x.shape) instead of writing them down or turning them into Python numbers, {leave}or leave "
        f"{MADE_OF_IT} out of export.formats"
    )
    mistake.__cause__ = error
    return mistake


def _failed(subject: Subject, error: Exception) -> UserError:
    """What torch.export said, with the line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    ways_out = PACKED if _is_packed(error) else ASSERTS if _asserts(error, subject.folder) else WAYS_OUT
    mistake = UserError(
        f"export: torch.export cannot capture the model: {type(error).__name__}: {first}"
        f"{user_line(error, subject.folder)}. {ways_out}; or leave {MADE_OF_IT} out of export.formats"
    )
    mistake.__cause__ = error
    return mistake


def _asserts(error: BaseException, folder: str) -> bool:
    """Whether the user's line that failed is an assertion."""
    frames = user_frames(error.__traceback__, folder)
    theirs = [frame for frame in frames if is_theirs(frame.filename, Path(folder))]
    return bool(theirs) and is_assertion(theirs[-1].filename, theirs[-1].lineno or 0)


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


def _because(subject: Subject, guards: _Guards, pattern: str = "", sizes: Mapping[str, int] | None = None) -> str:
    """` because of …`: the conditions that torch took for granted, in the job file's words, with the user's lines.

    Args:
        subject: names the dimensions.
        guards: all conditions.
        pattern: those that match it.
        sizes: those alone that do not hold at these, by dimension, where there is one.
    """
    named = {symbol: _named_source(subject, source) for symbol, source in guards.symbols.items()}
    shown = {}
    for condition, place in guards.found:
        if re.search(pattern, condition):
            words = re.sub(r"\b\w+\b", lambda found: named.get(found[0], found[0]), condition)
            if re.fullmatch(r"Eq\((\w+), \1\)", words):
                # Two inputs have one dimension.
                continue
            shown[words + place] = sizes is None or not _holds(condition, {s: sizes.get(named[s]) for s in named})
    if any(shown.values()):
        shown = {words: fails for words, fails in shown.items() if fails}
    # Conditions with a line of the user's first.
    first = sorted(shown, key=lambda words: " in " not in words)[:3]
    return f", because of {'; '.join(first)}" if first else ""


def _holds(condition: str, sizes: Mapping[str, int | None]) -> bool:
    """Whether a condition on sizes, as torch writes it, holds; False where it cannot be told. sizes: by symbol."""
    words = {"__builtins__": {}, "Eq": operator.eq, "Ne": operator.ne, "Mod": operator.mod}
    try:
        # Of an unknown size: None, which cannot be computed with.
        return bool(eval(condition, words, dict(sizes)))
    except Exception:
        return False


def _named_source(subject: Subject, source: str) -> str:
    found = re.match(r"L\['?([^]']+?)'?\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]", source)
    if not found:
        return source
    name, position, axis = found.groups()
    tensor = list(subject.inputs)[int(position)] if name == "flat_args" else name
    return _dimension(subject, tensor, int(axis))


def _require_every_size(program: ExportedProgram, subject: Subject, guards: _Guards) -> None:
    """Raises _RefusedWayError when the program refuses a size that was declared."""
    check = getattr(program.module(), "_guards_fn", None)
    if check is None:
        return

    def refusal(sizes: Mapping[str, int]) -> str:
        """The condition that does not hold at these sizes; empty where the program takes them."""
        shapes = {
            name: torch.empty(shape_at(subject, name, sizes), dtype=tensor.dtype, device="meta")
            for name, tensor in subject.inputs.items()
        }
        try:
            check(*shapes.values())
        except AssertionError as error:
            return str(error).removeprefix("Guard failed: ")
        return ""

    limits = {name: upper for name, (_, upper) in ranges(program, subject).items() if upper is not None}
    at_capture = sizes_of(subject.inputs, subject.dims)
    for sizes in declared_sizes(subject.dims, at_capture, limits):
        if not (refused := refusal(sizes)):
            continue
        tried = ", ".join(f"{name} {size}" for name, size in sizes.items())
        taken = what_is_taken(subject.dims, at_capture, limits, refusal)
        try:
            forward(subject.model, resized(subject.inputs, subject.dims, sizes), subject.project)
        except UserError as error:
            mistake = UserError(
                f"export: the model itself fails at {tried}, which is inside the declared sizes: "
                f"{describe(error.__cause__ or error)}{user_line(error.__cause__ or error, subject.folder)}; "
                f"declare the sizes that it takes ({taken or 'min, max'})"
            )
            mistake.__cause__ = error
            raise _RefusedWayError(_LIMITED if taken else _NARROWED, mistake) from error
        reached = _LIMITED if taken else _NARROWED
        if not taken and len(subject.dims) > 1:
            taken = "narrower ones in export.dynamic"
        declare = f"declare the sizes that the program takes ({taken}), " if taken else ""
        mistake = UserError(
            f"export: torch.export keeps one side of a decision on sizes: at {tried} the model runs and the program "
            f"would refuse ({refused}){_because(subject, guards, sizes=sizes)}; {declare}make the decision torch.cond, "
            f"or leave {MADE_OF_IT} out of export.formats"
        )
        raise _RefusedWayError(reached, mistake)

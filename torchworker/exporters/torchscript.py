"""TorchScript: by script, which keeps control flow; by trace, which does not; or mixed, part by part."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchworker.exporters.agreement import cases, disagreement
from torchworker.exporters.decisions import Decisions, first_difference, watched
from torchworker.exporters.subject import Made, Subject
from torchworker.parity.rule import compare_tensors
from torchworker.process.failure import UserError, user_line
from torchworker.process.shown_warnings import keep
from torchworker.project.answers import roundoff_of
from torchworker.project.signature import BATCH, input_specs, resized, sizes_of
from torchworker.project.user_code import arguments, forward, name_outputs
from torchworker.runtimes.load import call_script, flat, ignore_script_deprecation

_Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of a module."""


LARGE = 65
"""Samples of the largest batch that is tried where sizes decide."""


class _UnfaithfulError(Exception):
    """A capture that would not be the model; the message says why, with the user's line."""


def torchscript(subject: Subject, path: Path) -> Made:
    """Write the program and say how it was captured.

    Raises UserError when neither script, trace nor a mix of both gives the model's own outputs.
    """
    ignore_script_deprecation()
    refusals = {}
    for way in (_script, _trace, _mixed):
        try:
            program, method = way(subject)
            if differs := disagreement(partial(call_script, program), subject):
                raise _UnfaithfulError(differs)
        except _UnfaithfulError as refusal:
            refusals[way.__name__.strip("_")] = str(refusal)
            continue
        program.save(str(path))
        return Made(method)
    told = "; ".join(f"{name}: {why}" for name, why in refusals.items())
    raise UserError(
        f"export: TorchScript cannot capture the model faithfully. {told}. Ways out: annotate the types so that script "
        "can read it, make the branch torch.where or a fixed number of steps with a mask; or leave torchscript out of "
        "export.formats"
    )


def _script(subject: Subject) -> tuple[Any, str]:
    try:
        return torch.jit.script(subject.model), "torch.jit.script"
    except Exception as error:
        raise _UnfaithfulError(_brief(error)) from error


class _Flat(nn.Module):
    """The model with its inputs by position and its outputs as one tuple: a trace cannot return a mixed dict."""

    def __init__(self, subject: Subject, looks: bool = False) -> None:
        """looks: whether it looks at the fixed sizes of its inputs first."""
        super().__init__()
        self.model, self.names, self.project = subject.model, list(subject.inputs), subject.project
        self.looked = partial(_looked_at, fixed=_fixed(subject) if looks else ())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(self.looked(inputs))
        args, kwargs = arguments(self.model, dict(zip(self.names, inputs, strict=True)))
        return tuple(name_outputs(self.model(*args, **kwargs), self.project).values())


Fixed = Sequence[tuple[int, int, int]]
"""Places of inputs in forward's order, each with an axis and its size."""


def _fixed(subject: Subject) -> Fixed:
    """Sizes that are no dynamic dimension's. Asked before tracing, which makes tensors of sizes."""
    return [
        (place, axis, size)
        for place, spec in enumerate(input_specs(subject.inputs, subject.dims))
        for axis, size in enumerate(spec.shape)
        if isinstance(size, int)
    ]


def _looked_at(inputs: Sequence[Tensor], fixed: Fixed) -> list[Tensor]:
    """The inputs, by an operator that raises for another size and changes nothing.

    What Python or a scripted function asks of sizes is answered once for all by a trace, which knows them.
    """
    looked = list(inputs)
    for place, axis, size in fixed:
        (looked[place],) = torch.split(looked[place], [size], axis)
    return looked


def _guarded(subject: Subject) -> nn.Module:
    """The model, which looks at the fixed sizes of its inputs before it computes. Its weights keep their names."""
    kind, fixed = type(subject.model), _fixed(subject)

    def forward(self: nn.Module, *inputs: Tensor) -> Any:
        return kind.forward(self, *_looked_at(inputs, fixed))

    # By which a trace names its inputs.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    model = copy.copy(subject.model)
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _takes_other_sizes(program: Any, subject: Subject) -> bool:
    """Whether the trace answers where the model refuses a size that is fixed: a check that is not in it."""
    for name, spec in zip(subject.inputs, input_specs(subject.inputs, subject.dims), strict=True):
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int) or not size:
                continue
            tensor = subject.inputs[name]
            longer = {**subject.inputs, name: torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)}
            try:
                forward(subject.model, longer, subject.project)
            except UserError:
                with contextlib.suppress(Exception):
                    program(*longer.values())
                    return True
    return False


def _trace(subject: Subject) -> tuple[Any, str]:
    # A decision on the batch may come late: a file is asked for larger ones than the example's.
    largest = next((dim.max for dim in subject.dims if dim.name == BATCH), 1) or LARGE
    large = resized(
        subject.inputs, subject.dims, {**sizes_of(subject.inputs, subject.dims), BATCH: min(largest, LARGE)}
    )
    given = [*cases(subject), large]
    calls: list[_Call] = [arguments(subject.model, inputs) for inputs in given]
    plain: Callable[[], nn.Module]
    looking: Callable[[], nn.Module]
    if calls[0][1] or not isinstance(forward(subject.model, subject.inputs, subject.project), Tensor):
        calls = [(tuple(inputs.values()), {}) for inputs in given]
        plain, looking = partial(_Flat, subject), partial(_Flat, subject, looks=True)
    else:
        plain, looking = lambda: subject.model, partial(_guarded, subject)
    program, lost = _traced(plain(), calls, subject)
    if not lost or not _takes_other_sizes(program, subject):
        return program, "torch.jit.trace"
    return _traced(looking(), calls, subject)[0], "torch.jit.trace, which looks at fixed sizes"


def _traced(module: nn.Module, calls: Sequence[_Call], subject: Subject) -> tuple[Any, bool]:
    """The module traced, if it takes no decision that its inputs could turn; and whether it looks at sizes itself.

    Args:
        module: the model, or a part of it.
        calls: what it is given in several cases; it is traced on the first, and on the others where sizes decide.
        subject: for messages.
    """
    program, decisions = _recorded_on(module, calls[0], subject)
    if baked := decisions.on_data():
        keep(baked.warning())
        first = baked.said.split("\n")[0]
        raise _UnfaithfulError(f"it would bake in a decision made on the example data ({baked}): {first}")
    if not decisions.on_sizes():
        return program, decisions.lost_looks()
    for call in calls[1:]:
        try:
            _, others = _recorded_on(module, call, subject)
        except _UnfaithfulError:
            # Cutting may have broken what belongs together.
            continue
        difference = first_difference(decisions.on_sizes(), others.on_sizes())
        # Both sides may compute the same, as with and without contiguous().
        if difference and not _agrees(program, module, call):
            baked, other = difference
            keep(baked.warning())
            sizes = ["; ".join(str(list(tensor.shape)) for tensor in _tensors(one)) for one in (calls[0], call)]
            raise _UnfaithfulError(
                f"it would bake in a decision made on sizes ({baked}): {baked.value} on {sizes[0]}, "
                f"{other} on {sizes[1]}"
            )
    return program, decisions.lost_looks()


def _agrees(program: Any, module: nn.Module, call: _Call) -> bool:
    args, kwargs = call
    try:
        found = flat(program(*args, **kwargs))
    except RuntimeError:
        return False
    wanted = flat(module(*args, **kwargs))
    return len(found) == len(wanted) and all(
        compare_tensors(one, two, None, roundoff=roundoff_of(module)).passed
        for one, two in zip(found, wanted, strict=True)
    )


def _recorded_on(module: nn.Module, call: _Call, subject: Subject) -> tuple[Any, Decisions]:
    """The module traced on one call, and what Python decided meanwhile. Raises _UnfaithfulError where it cannot be."""
    args, kwargs = call
    given = {"example_kwarg_inputs": dict(kwargs)} if kwargs else {"example_inputs": tuple(args)}
    with warnings.catch_warnings(record=True) as caught, watched(subject.folder) as decisions:
        warnings.simplefilter("always")
        try:
            program = torch.jit.trace(module, **given, check_trace=False)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise _UnfaithfulError(f"{_brief(error)}{user_line(error, subject.folder)}") from error
    # What nobody watched, such as an edit in place of memory that another name has too.
    said = next((w for w in caught if issubclass(w.category, torch.jit.TracerWarning)), None)  # type: ignore[attr-defined]
    if said is not None:
        keep(said)
        first = str(said.message).split("\n")[0]
        raise _UnfaithfulError(
            f"it would bake in what it did with the example data ({Path(said.filename).name}:{said.lineno}): {first}"
        )
    return program, decisions


def _tensors(call: _Call) -> list[Tensor]:
    args, kwargs = call
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _mixed(subject: Subject) -> tuple[Any, str]:
    """Script what can be scripted, trace the parts that cannot and that take no decision on their inputs."""
    model = copy.deepcopy(subject.model)
    seen: dict[str, list[_Call]] = {}
    for inputs in cases(subject):
        now: dict[str, _Call] = {}
        with _recorded(model, now), contextlib.suppress(*([UserError] if seen else [])):
            forward(model, inputs, subject.project)
        for name, call in now.items():
            seen.setdefault(name, []).append(call)
    traced: list[str] = []
    program = _prepared(model, "", seen, traced, subject)
    if not traced:
        raise _UnfaithfulError("there is no part that could be traced inside one that can be scripted")
    return program, f"torch.jit.script, with {', '.join(traced)} by torch.jit.trace"


@contextlib.contextmanager
def _recorded(model: nn.Module, seen: dict[str, _Call]) -> Iterator[None]:
    """What each part of the model is called with first."""
    handles = []
    for name, module in model.named_modules():
        if name:
            # The name is bound now: the loop goes on.
            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                seen.setdefault(name, (args, kwargs))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prepared(
    module: nn.Module,
    name: str,
    seen: Mapping[str, Sequence[_Call]],
    traced: list[str],
    subject: Subject,
) -> Any:
    """The module scripted; or, where that fails, scripted around children that are; or traced."""
    try:
        return torch.jit.script(module)
    except Exception as error:
        scripting = _brief(error)
    inner: list[str] = []
    why = ""
    try:
        _prepare_children(module, name, seen, inner, subject)
        program = torch.jit.script(module)
        traced += inner
        return program
    except _UnfaithfulError as refusal:
        why = str(refusal)
    except Exception as error:
        # A second attempt may only say that the first left a part behind.
        scripting = scripting if "redefine" in str(error) else _brief(error)
    if not name or name not in seen:
        raise _UnfaithfulError(why or scripting)
    args, kwargs = seen[name][0]
    if not all(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise _UnfaithfulError(f"{name} cannot be scripted ({scripting}), and takes more than tensors")
    original = subject.model.get_submodule(name)
    try:
        program, _ = _traced(original, seen[name], subject)
    except _UnfaithfulError as refusal:
        raise _UnfaithfulError(f"{name} cannot be scripted ({scripting}) and not traced: {refusal}") from refusal
    traced.append(name)
    return program


def _prepare_children(
    module: nn.Module,
    name: str,
    seen: Mapping[str, Sequence[_Call]],
    traced: list[str],
    subject: Subject,
) -> None:
    for child_name, child in list(module.named_children()):
        full = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            # A list has no forward of its own: its parts are prepared, and the parent scripts the list.
            _prepare_children(child, full, seen, traced, subject)
        else:
            setattr(module, child_name, _prepared(child, full, seen, traced, subject))


def _brief(error: BaseException) -> str:
    """The type, the message's first line and, where TorchScript's compiler names one, the user's line."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].strip().rstrip(":")[:200] if lines else ""
    if "redefine method" in first:
        # What the compiler says the second time about a class that it failed to compile the first time.
        return "the rest cannot be scripted"
    place = next((line.strip() for line in lines if line.lstrip().startswith('File "')), "")
    if place:
        file, _, rest = place.removeprefix('File "').partition('", line ')
        place = f" ({Path(file).name}:{rest.split(',')[0].strip()})"
    return f"{type(error).__name__}: {first}{place}"

"""Every torch call of one forward, with its result, what it was given, and the module and the user's line it is in."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from torchworker.contract import Project
from torchworker.process.failure import is_theirs
from torchworker.project.user_code import forward


@dataclass
class Step:
    """One torch call of the model."""

    name: str
    """Of the call: `mean`."""
    value: Tensor
    feeds: list[int]
    """Steps whose results it was given."""
    path: str = ""
    """Of the innermost module that it is in; empty for the model itself."""
    module: nn.Module | None = None
    """That module; None where no frame of one was found."""
    line: str = ""
    """The user's line: `net.py:14: x = x - x.mean(0)`; empty where none is on the way to it."""

    @property
    def what(self) -> str:
        """`mean in blocks.0 (Block), net.py:14: x = x - x.mean(0)`."""
        module = f" in {self.path or 'the model'} ({type(self.module).__name__})" if self.module is not None else ""
        return f"{self.name}{module}{f', {self.line}' if self.line else ''}"


class _Recorder(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str], folder: Path, *, whole_numbers: bool) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._names, self._folder, self._whole_numbers = names, folder, whole_numbers
        self._made: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [item for group in given if isinstance(group, list | tuple) for item in group]
        feeds = [self._made[id(item)] for item in given if isinstance(item, Tensor) and id(item) in self._made]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and self._counts(tensor):
                # Kept alive, so that no later tensor gets its id; cloned, because it may be written into.
                self._kept.append(tensor)
                self._made[id(tensor)] = len(self.steps)
                path, module, line = place_of(sys._getframe(1), self._names, self._folder)
                name = getattr(func, "__name__", str(func))
                self.steps.append(Step(name, tensor.clone(), feeds, path, module, line))
        return result

    def _counts(self, tensor: Tensor) -> bool:
        return self._whole_numbers or tensor.is_floating_point()


def place_of(frame: FrameType | None, names: Mapping[int, str], folder: Path) -> tuple[str, nn.Module | None, str]:
    """Where a call is: path and object of the innermost module, and the user's innermost line, from a frame outwards.

    names: of the model's modules, by id.
    """
    path, module, line = "", None, ""
    while frame is not None and (module is None or not line):
        own = frame.f_locals.get("self")
        if module is None and isinstance(own, nn.Module) and id(own) in names:
            path, module = names[id(own)], own
        if not line and is_theirs(frame.f_code.co_filename, folder):
            file = Path(frame.f_code.co_filename).relative_to(folder)
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            line = f"{file}:{frame.f_lineno}: {source}"
        frame = frame.f_back
    return path, module, line


def record(
    model: nn.Module, inputs: Mapping[str, Tensor], project: Project, *, whole_numbers: bool = False
) -> list[Step]:
    """Every torch call of one forward that gives a floating point tensor.

    Args:
        model: in the mode in which it is looked at.
        inputs: by name, [batch, …].
        project: whose lines are named.
        whole_numbers: also calls that give whole numbers or booleans.
    """
    names = {id(module): name for name, module in model.named_modules()}
    recorder = _Recorder(names, Path(project.folder), whole_numbers=whole_numbers)
    with recorder:
        forward(model, {name: tensor.clone() for name, tensor in inputs.items()}, project)
    return recorder.steps


def record_modules(model: nn.Module, inputs: Mapping[str, Tensor], project: Project) -> list[Step]:
    """The tensors that modules are given and give, in the order of the calls, where torch calls cannot be seen.

    What a module is given is a step of the module that calls it. Arguments as of `record`; nothing feeds a step.
    """
    names = {id(module): name for name, module in model.named_modules()}
    steps: list[Step] = []
    running: list[nn.Module] = []

    def add(module: nn.Module, values: Any) -> None:
        for tensor in values if isinstance(values, list | tuple) else (values,):
            if isinstance(tensor, Tensor):
                steps.append(Step("forward", tensor.clone(), [], names.get(id(module), ""), module))

    def begins(module: nn.Module, given: Any) -> None:
        if running:
            add(running[-1], given)
        running.append(module)

    def ends(module: nn.Module, given: Any, result: Any) -> None:
        add(running.pop(), result)

    # Of all modules: a scripted one takes no hook of its own.
    with register_module_forward_pre_hook(begins), register_module_forward_hook(ends):
        forward(model, {name: tensor.clone() for name, tensor in inputs.items()}, project)
    return steps

"""How things of libraries are called: with a job file's plain values, and in their own order of arguments."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TRUTH_FIRST = ("y_true", "labels_true")
"""What scikit-learn calls the first argument of a metric: the target, where torch has the output."""


def as_tensors(function: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with numbers and lists as tensors where that is all that the function takes.

    So `torch.nn:CrossEntropyLoss` has its class weights from a list in the job file.

    Args:
        function: with annotations of its parameters.
        args: keyword arguments as YAML has them.

    Returns:
        The same; what became a tensor is of torch's default dtype.
    """
    if not any(_is_numbers(value) for value in args.values()):
        return dict(args)
    parameters = _parameters(function)
    return {
        name: torch.tensor(value, dtype=torch.get_default_dtype())
        if name in parameters and _is_tensor(parameters[name].annotation) and _is_numbers(value)
        else value
        for name, value in args.items()
    }


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it has a parameter of this name, or takes whatever it is given."""
    parameters = _parameters(function)
    return name in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def asks_for(function: Callable[..., Any], name: str) -> bool:
    """Whether it has a parameter of this name."""
    return name in _parameters(function)


def as_metric(metric: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
    """metric(outputs, target) of what may be a class with update() and compute(), or takes the target first."""
    update, compute = getattr(metric, "update", None), getattr(metric, "compute", None)
    if callable(update) and callable(compute):

        def over_all(outputs: Tensor, target: Tensor) -> Any:
            update(outputs, target)
            return compute()

        return over_all
    if next(iter(_parameters(metric)), "") in TRUTH_FIRST:
        return lambda outputs, target: metric(target, outputs)
    return metric


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Of what is written in C nothing is known.
        return {}


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_numbers(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_tensor(annotation: Any) -> bool:
    """A tensor or None, and nothing else."""
    if isinstance(annotation, str):
        words = annotation.replace("torch.", "").removeprefix("Optional[").removesuffix("]").split("|")
        return {word.strip() for word in words} - {"None"} == {"Tensor"}
    kinds = typing.get_args(annotation) or (annotation,)
    return {kind for kind in kinds if kind is not type(None)} == {Tensor}

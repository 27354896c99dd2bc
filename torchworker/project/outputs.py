"""What forward may return: tensors, in tuples, lists, dicts and dataclasses, as deep as one likes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def parts_of(outputs: object) -> list[tuple[str | int, Any]] | None:
    """What is in an output, in order: by key, by field of a dataclass or a named tuple, by place of a tuple or list.

    None for what has no parts, as a tensor.
    """
    if isinstance(outputs, Mapping):
        return [(str(key), item) for key, item in outputs.items()]
    if isinstance(outputs, tuple | list):
        return list(zip(getattr(outputs, "_fields", range(len(outputs))), outputs, strict=True))
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return [(field.name, getattr(outputs, field.name)) for field in fields(outputs)]
    return None


def with_parts(outputs: Any, parts: Sequence[Any]) -> Any:
    """Outputs of the same class with these in the place of what `parts_of` gives, in its order."""
    if isinstance(outputs, MutableMapping):
        same: Any = copy.copy(outputs)
        # One by one: ModelOutput of transformers refuses update().
        for key, part in zip(list(outputs), parts, strict=True):
            same[key] = part
        return same
    if isinstance(outputs, Mapping):
        return dict(zip(outputs, parts, strict=True))
    if hasattr(outputs, "_make"):
        return outputs._make(parts)
    if isinstance(outputs, tuple | list):
        return type(outputs)(parts)
    same = copy.copy(outputs)
    for field, part in zip(fields(outputs), parts, strict=True):
        # Also of a frozen one.
        object.__setattr__(same, field.name, part)
    return same


def mapped(change: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Outputs of the same classes with what `change` makes of each tensor; torch's tree_map sees no dataclass."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    parts = parts_of(outputs)
    return outputs if parts is None else with_parts(outputs, [mapped(change, part) for _, part in parts])


def is_plain(outputs: Any) -> bool:
    """Whether outputs have no class but Python's own and torch's tensors: an artifact is read without any other."""
    if outputs is None or isinstance(outputs, Tensor):
        return True
    parts = parts_of(outputs)
    own = type(outputs) in (tuple, list, dict, OrderedDict)
    return own and parts is not None and all(is_plain(part) for _, part in parts)

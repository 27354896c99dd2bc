"""Nested state, as user code has it, taken apart into tensors and the rest, and put together again.

torch.distributed.checkpoint writes tensors by name. Everything else (numbers, text, the keys of an optimizer's state,
which are numbers, and empty containers) is the skeleton: the same nesting without the tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SKELETON = "skeleton.pt"


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Objects that have a state_dict, such as modules, optimizers and schedules, replaced by it."""
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}


def tensors_of(state: Any) -> dict[str, Tensor]:
    """Every tensor by the path to it: `['model']['0.weight']`."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def skeleton_of(state: Any) -> bytes:
    """The rest, as a file that torch's restricted unpickler reads. Raises TypeError for what it would not read."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_of(state).items()}
    buffer = io.BytesIO()
    try:
        torch.save((shapes, pytree.tree_map_only(Tensor, lambda _: None, state)), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError) as error:
        strange = next((leaf for leaf in pytree.tree_leaves(state) if not _is_plain(leaf)), None)
        what = type(strange).__name__ if strange is not None else str(error).splitlines()[0]
        raise TypeError(
            f"a {what}, which cannot be saved; expected tensors, numbers, text, lists, tuples and dicts of them, and "
            "objects with a state_dict at the top"
        ) from None
    return buffer.getvalue()


def _is_plain(leaf: Any) -> bool:
    return leaf is None or type(leaf) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def empty_tensors(folder: Path) -> dict[str, Tensor]:
    """For every tensor that was saved, one of its shape and dtype to load it into, on the CPU."""
    shapes, _ = _read(folder)
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def put_together(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state as it was saved, with these tensors in it."""
    _, skeleton = _read(folder)
    state: dict[str, Any] = pytree.tree_map_with_path(
        lambda path, leaf: tensors.get(pytree.keystr(path), leaf), skeleton
    )
    return state


def _read(folder: Path) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Any]:
    read: tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Any] = torch.load(folder / SKELETON, weights_only=True)
    return read

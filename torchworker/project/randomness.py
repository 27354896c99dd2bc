"""The random generators that user code may draw from: torch's, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def seed_everything(seed: int) -> None:
    """Seed all of them, on every device."""
    torch.manual_seed(seed % 2**64)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


class OwnRandom:
    """Random generators of torch, Python and NumPy whose draws leave the process's own alone."""

    def __init__(self, seed: int) -> None:
        outside = _states()
        # Not torch.manual_seed, which seeds every GPU too, and a GPU's state would not be restored.
        torch.default_generator.manual_seed(seed % 2**64)
        _seed_others(seed)
        self._inside = _states()
        _restore(outside)

    def call(self, function: Callable[[], Result]) -> Result:
        """What the function returns that is called with this state."""
        outside = _states()
        _restore(self._inside)
        try:
            return function()
        finally:
            self._inside = _states()
            _restore(outside)

    def iterate(self, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What the iterator gives; it starts and goes on with this state."""
        iterator: Iterator[Any] | None = None
        position = 0
        while True:
            outside = _states()
            _restore(self._inside)
            try:
                iterator = start() if iterator is None else iterator
                item = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                error.add_note(f"sample {position} of the stream")
                raise
            finally:
                self._inside = _states()
                _restore(outside)
            yield item
            position += 1


def _states() -> tuple[Any, Any, Any]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy is not None else None


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy = sys.modules.get("numpy")
    if numpy is not None and states[2] is not None:
        numpy.random.set_state(states[2])

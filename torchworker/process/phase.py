"""What this process is at, as far as whoever watches it has to know: making a model or data may take long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_watchers: list[Callable[[bool], None]] = []
_depth = 0


def add_watcher(watcher: Callable[[bool], None]) -> None:
    """Call it now, and whenever making a model or data begins (True) or ends (False)."""
    _watchers.append(watcher)
    watcher(_depth > 0)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Around what makes a model or a dataset."""
    global _depth
    _depth += 1
    _say()
    try:
        yield
    finally:
        _depth -= 1
        _say()


def _say() -> None:
    for watcher in _watchers:
        watcher(_depth > 0)

"""Many objects at the same time, their progress, and keys that are written once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore

FILES_AT_ONCE = 8
SMALL_FILES_AT_ONCE = 32
"""Where each is one small request, which mostly waits."""
SMALL_UPLOADS_AT_ONCE = 128
"""The store writes each to disk, which it does for many at a time; twice as many gained nothing."""

_T = TypeVar("_T")
_Name = TypeVar("_Name")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread, one call at a time."""


def put_immutable(store: ObjectStore, key: str, body: bytes, other: str, *, probably_there: bool = False) -> None:
    """Create the object, or find it there with the same bytes.

    Args:
        store: the bucket.
        key: where.
        body: its bytes.
        other: what messages call something else that is there.
        probably_there: look first, which is one request instead of two.

    Raises:
        ReleaseError: it holds something else.
    """
    if probably_there and _holds(store, key, body):
        return
    try:
        store.put_new(key, body)
        return
    except PreconditionFailedError:
        there = _holds(store, key, body)
    if not there:
        raise ReleaseError(
            f"{key}: expected nothing or the same {len(body):,} bytes, got {other}; it is never replaced"
        )


def _holds(store: ObjectStore, key: str, body: bytes) -> bool:
    # A longer object is another one, whatever it is.
    try:
        found = store.get(key, len(body))
    except (ReleaseError, SettingsError):
        # Also one that its writer has encrypted so that nobody else may read it.
        return False
    return found is not None and found[0] == body


def in_parallel(function: Callable[[_Name], _T], names: Iterable[_Name], at_once: int = FILES_AT_ONCE) -> list[_T]:
    """Call `function` for every name, a few at a time; the results in order. Stops at the first error and raises it."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="bucket") as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]


class Meter:
    """Adds up the progress of files that move at the same time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Callable[[int], None] | None:
        """What is called with each number of bytes of one file that just moved."""
        return None if self._progress is None else lambda count: self._set(name, lambda done: done + count)

    def finish(self, name: str, size: int) -> None:
        """All of a file is there, whatever was counted before."""
        self._set(name, lambda done: size)

    def _set(self, name: str, change: Callable[[int], int]) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done[name] = change(self._done.get(name, 0))
            self._progress(min(sum(self._done.values()), self._total), self._total)

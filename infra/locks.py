"""A lock between processes of this machine, for which nobody waits for ever. The kernel frees it with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from train_and_ship.infra.errors import ServiceError

LOOK_SECONDS = 0.1


@contextlib.contextmanager
def locked(path: Path, what: str, seconds: float, waiting: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the lock of this file.

    Args:
        path: of the lock; it has the holder's process number.
        what: what the holder does, for messages: "changing this stack".
        seconds: to wait for another holder at most.
        waiting: told once who has it, when that is another process.

    Raises:
        ServiceError: another process has held it for so long.
    """
    # Not emptied before it is ours: it says whose it is.
    with path.open("a+") as lock:
        ends, noted = time.monotonic() + seconds, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = f"another process ({lock.read(20).strip() or 'unknown'})"
                if time.monotonic() >= ends:
                    raise ServiceError(
                        f"{path}: {holder} is {what} and has not ended within {seconds:g} s; end it, or wait for it"
                    ) from None
                if not noted:
                    waiting(f"{holder} is {what}; waiting for it for {seconds:g} s at most")
                    noted = True
                time.sleep(LOOK_SECONDS)
        with contextlib.suppress(OSError):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield

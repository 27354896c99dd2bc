"""Things that tests of any process need and that cost seconds to make: made once, kept below `build/`, read-only."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.projects import REPOSITORY

KEPT = REPOSITORY / "build" / "made-once"


def made_once(name: str, inputs: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """A folder that `make` filled, now or at an earlier call with the same inputs; nobody writes to it.

    inputs: all that decides what is made, such as versions; others of the same name are removed. Safe beside other
    processes that ask for the same: one makes it, the others wait.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = KEPT / f"{name}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]}"
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            for old in KEPT.glob(f"{name}-*"):
                shutil.rmtree(old)
            draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=KEPT))
            try:
                make(draft)
                draft.rename(kept)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return kept

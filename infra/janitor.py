"""Takes away what killed runs left on this machine and nobody came back for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

KEEP_SECONDS = 7 * 24 * 3600
"""A run can be gone on with for so long without losing the stage that it was in."""
LEFTOVERS = ("*.work", "checkpoints", "*.attempts")
"""Of a stage that was not completed; a complete one takes its own away."""


def clean(runs: Path, *, now: float | None = None) -> int:
    """Delete what is half done in runs that nothing was written to for a week; returns the bytes.

    runs: folder of `<model>/<run>/`. Complete stages, logs and reports stay. now: unix seconds.
    """
    moment = time.time() if now is None else now
    freed = 0
    for run in runs.glob("*/*-*"):
        leftovers = [folder for pattern in LEFTOVERS for folder in run.glob(pattern) if folder.is_dir()]
        if not leftovers or moment - _last_written(run) < KEEP_SECONDS:
            continue
        for folder in leftovers:
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder, ignore_errors=True)
    return freed


def _last_written(run: Path) -> float:
    """Unix seconds of the latest change below a folder."""
    return max(path.lstat().st_mtime for path in (run, *run.rglob("*")))

"""The end of a log that may be large."""

from __future__ import annotations

import os
from pathlib import Path

TAIL_BYTES = 256 * 1024
"""More than anybody reads of a log in an error message."""


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """At most the last `size` bytes of a file as text; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size).decode(errors="replace")
    except FileNotFoundError:
        return ""

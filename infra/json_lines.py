"""Files of one JSON object a line, which a process that dies may leave with half a line: only whole lines are read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

READ_BYTES = 1_000_000
"""What is read at once, and so the longest line that is read at all."""


def next_objects(file: BinaryIO) -> list[dict[str, Any]] | None:
    """What was appended to a file since the last call, at most about a megabyte of it.

    Half a line waits for its end. Left out is what is no JSON object: a writer was killed in the middle of it, and
    another one went on behind it.

    Args:
        file: open for reading, at the place to go on from; it stands behind what was read afterwards.

    Returns:
        Objects in the order of the file, perhaps none of what was read; None when nothing whole is left to read.
    """
    start = file.tell()
    text = file.read(READ_BYTES)
    # A line longer than that is nobody's: waiting for its end would read it again and again.
    whole = text if len(text) == READ_BYTES and b"\n" not in text else text[: text.rfind(b"\n") + 1]
    file.seek(start + len(whole))
    if not whole:
        return None
    return [found for line in whole.splitlines() if (found := _object(line)) is not None]


def all_objects(path: Path) -> Iterator[dict[str, Any]]:
    """What is in a file, in order, as `next_objects` reads it; nothing of a file that is not there."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while (found := next_objects(file)) is not None:
            yield from found


def append_object(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line by one write: a reader sees the line or nothing of it. Raises OSError."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

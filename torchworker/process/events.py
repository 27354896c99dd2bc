"""Progress of a running stage: one JSON object a line, appended to a file that the parent follows."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class EventLog:
    """Writes events, each whole line by one write, so that a reader never needs to wait for the end.

    Nothing depends on them: one that the disk has no room for is lost, and the work goes on.
    """

    def __init__(self, path: Path | None) -> None:
        """path: of the file; None for a process that nobody follows, whose events go nowhere."""
        self._file = path.open("ab+", buffering=0) if path is not None else None

    def write(self, event: str, **fields: Any) -> None:
        """One event. fields: JSON values."""
        if self._file is not None:
            line = json.dumps({"event": event, **fields}).encode() + b"\n"
            with contextlib.suppress(OSError):
                self._file.write(b"\n" * self._torn() + line)

    def _torn(self) -> bool:
        """Whether the file ends in half a line, of a rank that was killed or of a disk that was full."""
        assert self._file is not None
        size = self._file.seek(0, os.SEEK_END)
        return size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"

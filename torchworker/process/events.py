"""Progress of a running stage: one JSON object a line, appended to a file that the parent follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class EventLog:
    """Writes events; a line is flushed whole, so a reader never needs to wait for the end."""

    def __init__(self, path: Path | None) -> None:
        """path: of the file; None for a process that nobody follows, whose events go nowhere."""
        self._file = path.open("a", buffering=1) if path is not None else None

    def write(self, event: str, **fields: Any) -> None:
        """One event. fields: JSON values."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **fields}) + "\n")

"""What a custom loop reports: checked, thinned, written as events, and kept as the run's history."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from torchworker.durable import write_durably
from torchworker.process.events import EventLog
from torchworker.process.failure import UserError

RESERVED = ("step", "steps", "time")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,199}")
"""What MLflow takes as the name of a metric."""
ALL_KEPT = 1000
"""So many reports with the same names are all kept; from then on there is a least time between two:"""
LEAST_SECONDS = 0.25
"""and it grows with the run, so that a long one stays small:"""
POINTS = 2000
"""from as many points of that distance on, each doubling of the time adds about 1400."""


class Reports:
    """Rows of numbers by step. Only rank 0 has an event log, and keeps them.

    They are also appended to a file beside the checkpoints, so that a run that goes on from one knows what was
    reported up to its step, be it before or after the checkpoint was saved.
    """

    def __init__(self, name: str, rank: int, events: EventLog | None, journal: Path) -> None:
        """
        Args:
            name: of the reporting function, for messages.
            rank: this process's.
            events: where reports go; None but on rank 0.
            journal: the file, in a folder that need not exist.
        """
        self._name, self._rank, self._events = name, rank, events
        self._journal = journal
        self._earlier = _read(journal) if events is not None else []
        self._file: TextIO | None = None
        self._began = time.monotonic()
        self._counts: dict[frozenset[str], int] = {}
        self._last: dict[frozenset[str], float] = {}
        self._skipped: dict[frozenset[str], dict[str, float]] = {}
        self._steps: int | None = None
        self.rows: list[dict[str, float]] = []
        """`step`, `time` (unix seconds) and the metrics of every report that was kept."""
        self.failures: list[str] = []

    def add(self, metrics: Mapping[str, Any], step: int, steps: int | None) -> None:
        """Raises UserError for what is no finite number, naming it."""
        numbers = self._checked(metrics, step, steps)
        if self._events is None:
            return
        self._steps = steps
        kind = frozenset(numbers)
        row = {"step": step, **numbers, "time": time.time()}
        count, now = self._counts.get(kind, 0) + 1, time.monotonic()
        self._counts[kind] = count
        least = max(LEAST_SECONDS, (now - self._began) / POINTS)
        if count > ALL_KEPT and now - self._last[kind] < least:
            self._skipped[kind] = row
            return
        self._last[kind] = now
        self._skipped.pop(kind, None)
        self._keep(row)

    def finish(self) -> list[dict[str, float]]:
        """All rows; the last report of each kind is among them."""
        for row in sorted(self._skipped.values(), key=lambda row: row["time"]):
            self._keep(row)
        self._skipped.clear()
        return self.rows

    def resume(self, step: int) -> None:
        """Go on after this step; later reports of an attempt that died will come again."""
        if self._events is None:
            return
        self.rows[:] = [row for row in self._earlier if row["step"] <= step]
        self._close()
        write_durably(self._journal, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._file = self._journal.open("a", buffering=1)

    def _write(self, row: dict[str, float]) -> None:
        if self._file is None:
            # Nothing was resumed, so what an earlier attempt reported is void.
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._journal.open("w", buffering=1)
        self._file.write(json.dumps(row) + "\n")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _keep(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        try:
            self._write(row)
        except OSError as error:
            note = f"reports could not be written beside the checkpoints ({error.strerror}); a resumed run lacks them"
            self.failures = [note]
        assert self._events is not None
        metrics = {name: value for name, value in row.items() if name not in RESERVED}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = {} if self._steps is None else {"steps": self._steps}
        self._events.write("report", step=row["step"], **total, metrics=metrics, memory_bytes=memory, time=row["time"])

    def _checked(self, metrics: Mapping[str, Any], step: Any, steps: Any) -> dict[str, float]:
        if not _is_count(step):
            raise UserError(f"{self._name}: report(…, step=) expected a whole number from 0, got {step!r}")
        if steps is not None and not _is_count(steps):
            raise UserError(f"{self._name}: report(…, steps=) expected a whole number from 0, got {steps!r}")
        if not isinstance(metrics, Mapping) or not metrics:
            raise UserError(f"{self._name}: report(metrics, …) expected a mapping of names to numbers, got {metrics!r}")
        return {name: self._number(name, value, step) for name, value in metrics.items()}

    def _number(self, name: Any, value: Any, step: int) -> float:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            raise UserError(
                f"{self._name}: report() got a metric named {name!r}; expected letters, digits and _ . - / or a space, "
                f"and none of {', '.join(RESERVED)}"
            )
        try:
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{self._name}: report() expected a number for {name!r}, got {value!r}") from None
        if not math.isfinite(number):
            raise UserError(
                f"{self._name}: reported {name} {number} at step {step} (rank {self._rank}); expected a finite number; "
                "look at the learning rate and at the data for NaN or inf, and leave out what may be infinite"
            )
        return number


def _read(journal: Path) -> list[dict[str, float]]:
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in journal.read_bytes().splitlines():
            # A rank that was killed may have left half a line, a power cut anything.
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    rows.append(row)
    return rows


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

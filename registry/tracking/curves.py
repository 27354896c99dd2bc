"""What a training run says about itself, as points on curves. No MLflow here, no Prefect.

A worker appends events to a file, one JSON object a line (`torchworker/process/events.py`). Three kinds carry numbers:

    epoch   one row of the history; its curves are drawn over epochs
    step    what happens right now, at most a few a second; its curves are drawn over optimizer steps
    report  what a custom loop reports, one row of its history; its curves are drawn over the step that it gives

Fields that an event lacks are left out, fields that are unknown and are numbers become curves of their own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchworker.contract import TrainResult
from train_and_ship.infra.json_lines import next_objects

STRAGGLER_RATIO = 1.5
"""A rank is a straggler when its step takes this many times the median rank's."""
STEP_SECONDS = 1.0
"""Least time between two points of a step curve, which grows with the run so that a long one stays small:"""
STEP_POINTS = 2000
"""points of a step curve until it thins out; from then on each doubling of the time adds about 1400."""

# Where an event stands and what it promises; everything else in it was measured.
_NOT_MEASURED = {"event", "epoch", "epochs", "step", "steps", "eta_seconds", "time"}


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    """Epoch or optimizer step, whatever the curve is drawn over."""
    time: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """How long a step takes on each rank, waiting for the others left out."""

    seconds: Mapping[int, float]
    """Mean seconds by rank."""

    @property
    def median(self) -> float:
        """The lower one of two middles: of two ranks, the fast one is the measure of the slow one."""
        return statistics.median_low(self.seconds.values())

    @property
    def slowest(self) -> int:
        """The rank with the longest step."""
        return max(self.seconds, key=lambda rank: self.seconds[rank])

    @property
    def ratio(self) -> float:
        """The slowest rank's step in medians."""
        return self.seconds[self.slowest] / self.median if self.median > 0 else 1.0

    @property
    def straggler(self) -> int | None:
        """The rank that the others wait for, if there is one."""
        return self.slowest if self.ratio > STRAGGLER_RATIO else None


def rank_times(event: Mapping[str, Any]) -> RankTimes | None:
    """None when the event does not say."""
    said = event.get("step_seconds")
    if not isinstance(said, Mapping) or not said:
        return None
    return RankTimes(seconds={int(rank): float(value) for rank, value in said.items()})


def event_points(event: Mapping[str, Any]) -> list[Point]:
    """The curves' next points; none for an event that measured nothing."""
    when = float(event.get("time", time.time()))
    points = []
    if event.get("event") == "epoch":
        points += _row_points(event, int(event["epoch"]), when)
    if event.get("event") == "report":
        points += _report_points(event["metrics"], int(event["step"]), when)
    if event.get("event") in ("epoch", "step") and "step" in event:
        step = int(event["step"])
        if event["event"] == "step":
            points += [Point(f"steps/{key}", value, step, when) for key, value in _numbers(event)]
        if times := rank_times(event):
            points += [Point(f"ranks/step_seconds_{rank}", value, step, when) for rank, value in times.seconds.items()]
            if len(times.seconds) > 1:
                points.append(Point("ranks/slowest_to_median", times.ratio, step, when))
            if times.straggler is not None:
                points.append(Point("ranks/straggler", times.straggler, step, when))
    return points


def history_points(history: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Every epoch of a finished training; the same points that its epoch events gave."""
    now = time.time()
    points = []
    for number, row in enumerate(history, start=1):
        place, when = position(row, number), float(row.get("time", now))
        if "step" in row:
            metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
            points += _report_points(metrics, place, when)
        else:
            points += _row_points(row, place, when)
    return points


def position(row: Mapping[str, Any], number: int) -> int:
    """What a row of a history is drawn over: its step, its epoch, or else its number from 1."""
    return int(row.get("step", row.get("epoch", number)))


def latest_of(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last value of everything in a history."""
    latest: dict[str, float] = {}
    for row in history:
        latest |= row
    return latest


def shipped_of(trained: TrainResult) -> dict[str, float]:
    """What the history says of the weights that ship: the row of their epoch, or of a custom loop all last values."""
    return dict(trained.shipped) if trained.shipped_epoch else latest_of(trained.history)


def _row_points(row: Mapping[str, Any], epoch: int, when: float) -> list[Point]:
    return [Point(key, value, epoch, when) for key, value in _numbers(row)]


def _report_points(metrics: Mapping[str, float], step: int, when: float) -> list[Point]:
    """Everything in it was measured: a custom loop may report its epoch too."""
    return [Point(key, float(value), step, when) for key, value in metrics.items()]


def _numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in event.items():
        if key not in _NOT_MEASURED and isinstance(value, int | float) and math.isfinite(value):
            if key == "memory_bytes":
                yield "memory_megabytes", value / 1e6
            else:
                yield key, float(value)


class EventPoints:
    """Points of the events in a file, also while it grows. The file may be renamed meanwhile."""

    def __init__(self, path: Path) -> None:
        # Opened at once: the folder of a stage gets another name when the stage is complete.
        self._file = path.open("rb")
        self._began: float | None = None
        self._last_step_at = -math.inf

    def read(self) -> list[Point]:
        """Some of what was appended since the last call, empty when there is nothing; half a line waits."""
        points: list[Point] = []
        while not points and (events := next_objects(self._file)) is not None:
            for event in events:
                if self._is_kept(event):
                    points += event_points(event)
        return points

    def _is_kept(self, event: Mapping[str, Any]) -> bool:
        """Thin out steps by what the events say, so that whoever reads the file gets the same points."""
        when = event.get("time")
        if when is None:
            return True
        if self._began is None:
            self._began = when
        if event.get("event") != "step":
            return True
        if when - self._last_step_at < max(STEP_SECONDS, (when - self._began) / STEP_POINTS):
            return False
        self._last_step_at = when
        return True

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def file_points(path: Path) -> list[Point]:
    """All points of a file of events; none when there is no such file."""
    if not path.is_file():
        return []
    events, points = EventPoints(path), list[Point]()
    try:
        while more := events.read():
            points += more
        return points
    finally:
        events.close()

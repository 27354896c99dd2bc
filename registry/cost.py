"""What a run costs: wall-clock seconds, CPU-seconds and GPU-seconds by stage, and their price.

Kept in a file of the run's folder, one JSON object a line, so that a run that is gone on with counts what was spent
before. A line is written when something begins and another when it has ended: what was killed has only the first, and
the report says that its cost is not known.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from train_and_ship.infra.json_lines import all_objects, append_object

LEDGER = "costs.jsonl"
FLOW = "the flow between its stages"
"""Prefect, MLflow and the start of processes: what belongs to no stage."""
IN_PARALLEL = {"inspect": "inspect", "cpp": "build the C++ runner"}
"""Work in child processes that goes on beside the stages, and is no part of the one that it ends in."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one stage took, over all attempts that came to an end."""

    stage: str
    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """CPU-seconds, user and system, of this process and all that it started."""
    gpu: float = 0.0
    """GPUs held, times seconds."""
    attempts: int = 0
    killed: int = 0
    """Attempts that began and never ended: what they took is not in the numbers."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What an hour costs; None where nobody said."""

    cpu_hour: float | None = None
    gpu_hour: float | None = None
    currency: str = ""

    def price(self, spent: Spent) -> float | None:
        """None unless everything that was used has a rate: half a price would be taken for the whole."""
        if self.cpu_hour is None or (spent.gpu and self.gpu_hour is None):
            return None
        return (spent.cpu * self.cpu_hour + spent.gpu * (self.gpu_hour or 0.0)) / 3600


@dataclass
class Meter:
    """What a stage adds to its own cost while it is measured."""

    cpu: float = 0.0
    """CPU-seconds on other machines, which nobody here can see."""
    _gpus: int = 0
    _since: float = 0.0

    def ranks_started(self, device: str, ranks: int) -> None:
        """The ranks of a training have their devices: on GPUs each has one of its own, from now to the stage's end."""
        if device.startswith("cuda") and not self._gpus:
            self._gpus, self._since = ranks, time.perf_counter()

    @property
    def gpu(self) -> float:
        """GPU-seconds until now."""
        return self._gpus * (time.perf_counter() - self._since)


class Ledger:
    """Measures the stages of one run in this process and writes down what they took."""

    def __init__(self, folder: Path, children: Callable[[], Mapping[str, float]], server: Callable[[], float]) -> None:
        """Begin to measure.

        Args:
            folder: The run's.
            children: CPU-seconds of child processes that have ended, by stage.
            server: CPU-seconds of the fork server.
        """
        self._path, self._children, self._server = folder / LEDGER, children, server
        self._began, self._first, self._seen = time.perf_counter(), self._now(), dict(children())
        self._server_at_first = server()
        self._wall = self._cpu = 0.0
        self._id = self._write_begin(FLOW)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Meter]:
        """Write down what the block takes, also when it raises."""
        entry, began, cpu, meter = self._write_begin(name), time.perf_counter(), self._now(), Meter()
        try:
            yield meter
        finally:
            # A fork server that died and was started again has forgotten what its children took.
            wall, here = time.perf_counter() - began, max(0.0, self._now() - cpu)
            self._wall += wall
            self._cpu += here
            self._write_end(entry, name, wall, here + meter.cpu, meter.gpu)

    def close(self) -> None:
        """Write down what no stage has taken. Further stages would be counted twice in it."""
        whole = time.perf_counter() - self._began
        for child, name in IN_PARALLEL.items():
            seconds = self._children().get(child, 0.0) - self._seen.get(child, 0.0)
            if seconds > 0:
                self._write_end(self._write_begin(name), name, 0.0, seconds, 0.0)
        cpu = self._now() - self._first - self._cpu + max(0.0, self._server() - self._server_at_first)
        self._write_end(self._id, FLOW, max(0.0, whole - self._wall), max(0.0, cpu), 0.0)

    def _now(self) -> float:
        return time.process_time() + sum(cpu for name, cpu in self._children().items() if name not in IN_PARALLEL)

    def _write_begin(self, name: str) -> str:
        entry = uuid.uuid4().hex[:12]
        self._write({"began": entry, "stage": name, "at": datetime.now(UTC).isoformat(timespec="seconds")})
        return entry

    def _write_end(self, entry: str, name: str, wall: float, cpu: float, gpu: float) -> None:
        self._write({"ended": entry, "stage": name, "wall": wall, "cpu": cpu, "gpu": gpu})

    def _write(self, line: Mapping[str, object]) -> None:
        append_object(self._path, line)


def read_costs(folder: Path) -> list[Spent]:
    """What each stage of a run has taken.

    Args:
        folder: The run's.

    Returns:
        The stages in the order in which they first began; empty when nothing was measured.
    """
    found: dict[str, Spent] = {}
    open_entries: dict[str, str] = {}
    for entry in all_objects(folder / LEDGER):
        name = entry["stage"]
        so_far = found.setdefault(name, Spent(stage=name))
        if "began" in entry:
            open_entries[entry["began"]] = name
            continue
        open_entries.pop(entry["ended"], None)
        found[name] = replace(
            so_far, wall=so_far.wall + entry["wall"], cpu=so_far.cpu + entry["cpu"], gpu=so_far.gpu + entry["gpu"],
            attempts=so_far.attempts + 1,
        )  # fmt: skip
    for name in open_entries.values():
        found[name] = replace(found[name], killed=found[name].killed + 1)
    # It began first and is what is left.
    return sorted(found.values(), key=lambda item: item.stage == FLOW)


def total(costs: list[Spent]) -> Spent:
    """All stages together."""
    return Spent(
        stage="all",
        wall=sum(item.wall for item in costs),
        cpu=sum(item.cpu for item in costs),
        gpu=sum(item.gpu for item in costs),
        attempts=max((item.attempts for item in costs), default=0),
        killed=sum(item.killed for item in costs),
    )

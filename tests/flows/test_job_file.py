"""The job file is read once a run, whatever becomes of the file or of the run."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from tests.support.retraining import POOR
from train_and_ship.api import Job, Shipped, live, run
from train_and_ship.flows.retrain import retrain
from train_and_ship.infra.errors import GateError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import FAILED, PROMOTED, read_decisions
from train_and_ship.registry.tracking.runs import REPORT

MODEL = "once"


class Reads:
    """How often this process has opened a file."""

    def __init__(self) -> None:
        self.path, self.count = "", 0
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.path and str(arguments[0]) == self.path:
            self.count += 1


@pytest.fixture(scope="module")
def counter() -> Reads:
    return Reads()


@pytest.fixture
def reads(counter: Reads) -> Iterator[Reads]:
    yield counter
    counter.path = ""


def job_file(folder: Path, reads: Reads, **job: Any) -> str:
    job = {"train": POOR, "export": {"formats": ["torchscript"]}, "parity": {"cpp": "off"}, **job}
    path = write_project(folder, name=MODEL, **job)
    reads.path, reads.count = str(path), 0
    return str(path)


def test_train_and_ship_reads_it_once_also_from_a_notebook_which_has_a_loop_that_runs(
    stack: Settings, store: ObjectStore, tmp_path: Path, reads: Reads
) -> None:
    job = Job.load(job_file(tmp_path, reads))

    async def cell() -> Shipped:
        return run(job)

    shipped = asyncio.run(cell())
    assert reads.count == 1 and live(MODEL).release == shipped.release
    # As `ship run` leaves it: folder, report and record.
    folder = stack.runs / MODEL / shipped.run_url.rpartition("/")[2]
    assert shipped.report == folder / REPORT and shipped.report.is_file()
    recorded, _ = store.get(f"{release_prefix(MODEL, shipped.release)}job.json")
    assert Job.from_record(json.loads(recorded)).digest() == job.digest()


def test_retrain_reads_it_once(stack: Settings, store: ObjectStore, tmp_path: Path, reads: Reads) -> None:
    state = asyncio.run(retrain(job=job_file(tmp_path, reads), force=True, return_state=True))
    assert state.name in ("Promoted", "Kept") and reads.count == 1
    skipped = asyncio.run(retrain(job=job_file(tmp_path, reads), return_state=True))
    assert skipped.name == "Skipped" and reads.count == 1


def test_a_run_that_fails_is_reported_and_recorded_without_it(
    stack: Settings, store: ObjectStore, tmp_path: Path, reads: Reads
) -> None:
    path = job_file(tmp_path, reads, gates={"accuracy": {"min": 2.0}})
    with pytest.raises(GateError):
        asyncio.run(retrain(job=path, force=True))
    decision = read_decisions(Channel(store, MODEL), 1)[-1]
    assert decision.decision == FAILED != PROMOTED and "gates failed" in decision.why
    assert (stack.runs / MODEL / decision.flow_run / REPORT).is_file() and reads.count == 1

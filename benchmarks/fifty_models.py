"""Fifty models on one worker: all due at the same moment, two at a time, and nothing new for any of them.

    python -m benchmarks.fifty_models [--models 50] [--at-once 2]

Starts a stack of its own. Job files are written and deployed by one `ship deploy`, a run of each is scheduled for the
same moment, and what happens is read from Prefect's own record of states. One model is trained; the live releases of
the others are its release under their names, because fifty trainings would measure training. Writes the result into
docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy
import yaml

from benchmarks.report import PAGE, ROOT, machine, write
from tests.support.local_stack import enter_local_stack
from tests.support.releases import move
from train_and_ship.infra import stack
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.processes import PidFile
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.data.snapshots import take
from train_and_ship.registry.release.manifest import JOB, MANIFEST, build_manifest

SHIP = Path(sys.executable).with_name("ship")
CODE = """
import numpy, torch
from torch import nn
from torch.utils.data import TensorDataset


def build_model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def build_dataset(split, snapshot):
    found = numpy.load(f"{snapshot}/{split}.npz")
    return TensorDataset(torch.from_numpy(found["inputs"]), torch.from_numpy(found["target"]))
"""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
NEVER = "0 3 29 2 *"
"""The runs are created here, all for the same moment."""
LEAD = 30
"""Seconds from the first run that is created until all are due."""
LONGEST = 3600.0
"""Seconds until a tick counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run by Prefect's record; times in seconds after it was due."""

    name: str
    state: str
    taken: float
    """When the worker took it: Pending, which is when it holds a place."""
    running: float
    ended: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a process used while a tick was worked off."""

    cpu: float
    """User and system seconds, its own."""
    rss: int
    """Largest, in bytes."""


def write_jobs(folder: Path, models: int) -> list[Path]:
    """Job files of models that differ in their names, in one project with one snapshot."""
    data = folder / "data"
    data.mkdir(parents=True)
    (folder / "tiny.py").write_text(CODE)
    chance = numpy.random.default_rng(0)
    for split in ("train", "validation"):
        inputs = chance.standard_normal((96, 4)).astype(numpy.float32)
        numpy.savez(data / f"{split}.npz", inputs=inputs, target=(inputs[:, 0] > 0).astype(numpy.int64))
    take(data)
    paths = []
    for number in range(models):
        job = {
            "name": f"tiny-{number:02}",
            "model": {"factory": "tiny:build_model"},
            "data": {"factory": "tiny:build_dataset", "snapshot": {"path": "data"}},
            "train": {"epochs": 1, "processes": 1, "batch_size": 32},
            "export": {"formats": ["onnx"]},
        }
        paths.append(folder / f"tiny-{number:02}.yaml")
        paths[-1].write_text(yaml.safe_dump(job))
    return paths


def put_live(settings: Settings, jobs: list[Path], folder: Path) -> None:
    """Train the first model; publish what came of it as a release of each of the others, and move their channels."""
    done = subprocess.run([SHIP, "retrain", str(jobs[0])], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    store, first = ObjectStore.from_settings(settings), jobs[0].stem
    pointer = read_pointer(Channel(store, first, "prod"))
    assert pointer is not None
    made = fetch_release(store, first, pointer.release, folder)
    (folder / MANIFEST).unlink()
    for job in jobs[1:]:
        document = json.loads((folder / JOB).read_text())
        (folder / JOB).write_text(json.dumps({**document, "name": job.stem}))
        manifest = build_manifest(
            folder, model=job.stem, formats=made.formats, signature=made.signature, metrics=made.metrics,
            serve=made.serve,
        )  # fmt: skip
        publish(store, folder, manifest)
        move(store, manifest, model=job.stem, mlflow_version="")


class Watch:
    """CPU and memory of Prefect's server and of the worker, without the runs that it starts."""

    def __init__(self, settings: Settings) -> None:
        records = {name: PidFile.read(settings.home / "pids" / f"{name}.json") for name in ("prefect", "worker")}
        self._processes = {name: record.process() for name, record in records.items() if record is not None}
        self._before = {name: self._cpu(name) for name in self._processes}
        self._rss = dict.fromkeys(self._processes, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _cpu(self, name: str) -> float:
        process = self._processes[name]
        assert process is not None
        times = process.cpu_times()
        return float(times.user + times.system)

    def _look(self) -> None:
        while not self._over.wait(1):
            for name, process in self._processes.items():
                assert process is not None
                self._rss[name] = max(self._rss[name], process.memory_info().rss)

    def stop(self) -> dict[str, Cost]:
        self._over.set()
        self._thread.join()
        return {name: Cost(cpu=self._cpu(name) - self._before[name], rss=self._rss[name]) for name in self._processes}


def ask(settings: Settings, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Reads, and runs that are created long before they are due: they can be asked again of a server that is busy."""
    return prefect_api(settings, method, path, body, tries=20).raise_for_status().json()


def tick(settings: Settings, jobs: list[Path]) -> tuple[float, list[Ran], dict[str, Cost]]:
    """Deploy all jobs, have all of them due at the same moment, and wait until each run has ended.

    Returns the seconds that deploying took, the runs in the order in which the worker took them, and what it cost.
    """
    began = time.perf_counter()
    argv = [str(SHIP), "deploy", "--in-place", *map(str, jobs), "--cron", NEVER]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    deploying = time.perf_counter() - began
    watch = Watch(settings)
    due = datetime.now(UTC) + timedelta(seconds=LEAD)
    body = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": due.isoformat()}}}
    ids = []
    for job in jobs:
        deployment = ask(settings, "GET", f"/deployments/name/retrain/{job.stem}")
        ids.append(ask(settings, "POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])
    if datetime.now(UTC) > due:
        raise SystemExit(f"expected to create all runs within {LEAD} s")
    deadline = time.monotonic() + LONGEST
    while True:
        runs = ask(settings, "POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": ids}}, "limit": 200})
        ended = [run for run in runs if run["state_type"] in ENDED]
        print(f"{(datetime.now(UTC) - due).total_seconds():4.0f} s after they were due: {len(ended)} ended", flush=True)
        if len(ended) == len(jobs):
            break
        if time.monotonic() > deadline:
            raise SystemExit(f"stuck: {[(run['name'], run['state_name']) for run in runs]}")
        time.sleep(5)
    cost = watch.stop()
    ran = []
    for run in runs:
        states = ask(settings, "GET", f"/flow_run_states/?flow_run_id={run['id']}")
        when = {
            str(state["type"]): (datetime.fromisoformat(str(state["timestamp"])) - due).total_seconds()
            for state in reversed(states)
        }
        ran.append(
            Ran(
                name=str(run["name"]), state=str(run["state_name"]), taken=when["PENDING"], running=when["RUNNING"],
                ended=next(when[kind] for kind in ENDED if kind in when),
            )
        )  # fmt: skip
    return deploying, sorted(ran, key=lambda run: run.taken), cost


def most_at_once(ran: list[Ran]) -> int:
    """The largest number of runs that held a place at the same time."""
    changes = sorted([(run.ended, -1) for run in ran] + [(run.taken, 1) for run in ran])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def table(deploying: float, ran: list[Ran], limit: int, cost: dict[str, Cost]) -> list[str]:
    ended = sorted(run.ended for run in ran)
    # A place that became free, until the next run holds it.
    gaps = [run.taken - free for run, free in zip(ran[limit:], ended, strict=False)]
    rows = [
        ("`ship deploy` of all, s", f"{deploying:.1f}"),
        ("due → the first ones taken, s", f"{statistics.median(run.taken for run in ran[:limit]):.1f}"),
        ("a place is free → the next one taken, median and most, s", f"{statistics.median(gaps):.1f}, {max(gaps):.1f}"),
        ("taken → Running, median, s", f"{statistics.median(run.running - run.taken for run in ran):.1f}"),
        ("Running → ended, median, s", f"{statistics.median(run.ended - run.running for run in ran):.1f}"),
        ("due → all ended, s", f"{ended[-1]:.0f}"),
        ("most that held a place at once", str(most_at_once(ran))),
        *(
            (f"{name}: CPU s, largest MB", f"{cost[part].cpu:.0f}, {cost[part].rss / 1e6:.0f}")
            for name, part in (("Prefect server", "prefect"), ("worker, without the runs", "worker"))
        ),
    ]
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=2)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ship-fifty-"))
    enter_local_stack(folder / "home")
    os.environ["SHIP_RUNS_AT_ONCE"] = str(asked.at_once)
    settings = Settings.load()
    try:
        stack.up(settings, lambda line: print(line, flush=True))
        jobs = write_jobs(folder / "project", asked.models)
        put_live(settings, jobs, folder / "release")
        deploying, ran, cost = tick(settings, jobs)
        if wrong := [run for run in ran if run.state != "Skipped"]:
            raise SystemExit(f"expected every run to find nothing new, got {wrong}")
        if (most := most_at_once(ran)) > asked.at_once:
            raise SystemExit(f"expected at most {asked.at_once} at once, got {most}")
        logs = [log.read_text(errors="replace") for log in (settings.home / "logs").glob("*.log*")]
        locked = sum(log.count("database is locked") for log in logs)
    finally:
        stack.down(settings)
        shutil.rmtree(folder, ignore_errors=True)
    text = "\n".join([
        "## Many models on one worker",
        "",
        machine("torch", "prefect", "mlflow"),
        f"Measured with `python -m benchmarks.fifty_models --models {asked.models} --at-once {asked.at_once}`: "
        f"{asked.models} models, all due at the same moment, on the local stack (SQLite) with {asked.at_once} "
        "places. Each has a live release and nothing new. *Taken* is when the worker takes a run from the queue, from "
        "*taken* to *Running* Python starts and imports Prefect.",
        "",
        *table(deploying, ran, asked.at_once, cost),
        "",
        f"Every run was skipped for lack of anything new; the logs say “database is locked” {locked} times.",
    ])  # fmt: skip
    print(text)
    write(PAGE, "fifty_models", text)


if __name__ == "__main__":
    main()

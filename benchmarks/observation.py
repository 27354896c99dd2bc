"""What it costs training to be watched: the digits job with and without the live run in MLflow.

Needs an MLflow server (`ship up`, or MLFLOW_TRACKING_URI). Both sides train in the same fork server with the same
events; they run alternately, in swapped order from round to round, after one round that is not counted. Writes the
result into docs/benchmarks.md.
"""

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from report import PAGE, ROOT, machine, write

from torchworker.contract import EVENTS, TrainRequest, TrainResult, decode
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.tracking.connection import check_reachable, connect, import_mlflow
from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.runs import RunRecord
from train_and_ship.tasks.requests import project_of, run_params, train_settings
from train_and_ship.tasks.worker import call_worker

SIDES = ("watched", "alone")


@dataclass(frozen=True, kw_only=True)
class Training:
    rate: float
    """Samples per second over all epochs."""
    seconds: float
    """Wall clock of the worker call."""
    cpu: float
    """CPU seconds of this process and of the MLflow server meanwhile; the ranks are not in it."""
    points: int
    """Values that MLflow has of it."""


def server_processes(url: str) -> list[psutil.Process]:
    """The processes of a server on this machine; none when it is elsewhere or somebody else's."""
    port = int(url.rpartition(":")[2].strip("/"))
    for process in psutil.process_iter():
        try:
            if any(item.laddr.port == port and item.status == "LISTEN" for item in process.net_connections()):
                parent = process.parent()
                whole = parent if parent and "mlflow" in " ".join(parent.cmdline()) else process
                return [whole, *whole.children(recursive=True)]
        except psutil.Error:
            continue
    return []


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in processes)


def train(
    side: str, fork_server: ForkServer, job: Job, folder: Path, url: str, server: list[psutil.Process]
) -> Training:
    work = folder / uuid.uuid4().hex
    work.mkdir()
    project = project_of(job, ROOT / "examples/digits")
    request = TrainRequest(
        project=project, train=train_settings(job), folder=str(work), checkpoints=str(work / "checkpoints")
    )
    flow_run = uuid.uuid4().hex
    record = RunRecord(
        model="observation-benchmark",
        run_name=side,
        params=run_params(job),
        tags={"flow_run_id": flow_run},
        description="",
        started=time.time(),
    )
    live = LiveRun(record, url, sys.exit) if side == "watched" else None
    if live:
        live.start()
        live.tail(work / EVENTS)
    cpu, began = cpu_seconds(server), time.perf_counter()
    said = asyncio.run(call_worker(fork_server, "train", request, work, lambda event: None))
    seconds = time.perf_counter() - began
    cpu = cpu_seconds(server) - cpu
    result: TrainResult = decode(TrainResult, said)
    points = 0
    if live:
        live.stop(30)
        points = points_of(url, flow_run)
        live.end("KILLED", "a benchmark registers nothing")
    trained = sum(row["seconds"] for row in result.history)
    rate = result.train_samples * len(result.history) / trained
    return Training(rate=rate, seconds=seconds, cpu=cpu, points=points)


def points_of(url: str, flow_run: str) -> int:
    client: Any = connect(url)
    experiment = client.get_experiment_by_name("observation-benchmark")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.flow_run_id = '{flow_run}'")
    return sum(len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics)


def section(rounds: list[dict[str, Training]], epochs: int, server_is_here: bool) -> str:
    ratios = [timing["watched"].rate / timing["alone"].rate for timing in rounds]
    cores = os.cpu_count() or 1
    shares = [
        (timing["watched"].cpu / timing["watched"].seconds - timing["alone"].cpu / timing["alone"].seconds) / cores
        for timing in rounds
    ]
    lines = [
        "## What it costs to be watched",
        "",
        machine("torch", "mlflow"),
        f"Measured with `python benchmarks/observation.py`: examples/digits, {epochs} epochs on two processes, with "
        "and without the live run in MLflow, alternately, one uncounted round first. CPU is what this process and the "
        f"MLflow server{'' if server_is_here else ' (elsewhere, not counted)'} use while it trains, over all cores; "
        "on a machine with free cores none of it is taken from training.",
        "",
        "| round | first | watched, samples/s | alone, samples/s | ratio | points sent | added CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (timing, ratio, share) in enumerate(zip(rounds, ratios, shares, strict=True), 1):
        lines.append(
            f"| {number} | {next(iter(timing))} | {timing['watched'].rate:,.0f} | {timing['alone'].rate:,.0f} "
            f"| {ratio:.3f} | {timing['watched'].points} | {share:.2%} |"
        )
    lines += [
        "",
        f"**Median ratio of samples per second, watched to alone: {statistics.median(ratios):.3f}; "
        f"added CPU: {statistics.median(shares):.2%} of the machine.**",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; each trains on both sides once")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()

    url = Settings.load().mlflow_url
    check_reachable(url)
    import_mlflow()
    server = server_processes(url)
    job, _ = load_job(ROOT / "examples/digits/job.yaml")
    job = job.model_copy(update={"train": job.train.model_copy(update={"epochs": options.epochs})})
    counted = []
    with tempfile.TemporaryDirectory() as name:
        fork_server = ForkServer(Path(name) / "host.log")
        for number in range(options.rounds + 1):
            order = SIDES if number % 2 else SIDES[::-1]
            timings = {side: train(side, fork_server, job, Path(name), url, server) for side in order}
            watched, alone = timings["watched"], timings["alone"]
            note = " (warm-up, not counted)" if number == 0 else ""
            print(
                f"round {number}{note}: watched {dataclasses.asdict(watched)}, alone {dataclasses.asdict(alone)}, "
                f"ratio {watched.rate / alone.rate:.3f}",
                flush=True,
            )
            if number:
                counted.append(timings)
        fork_server.close()
    text = section(counted, options.epochs, bool(server))
    print(f"\n{text}")
    write(options.write, "observation", text)


if __name__ == "__main__":
    main()

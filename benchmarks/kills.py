"""Kill random ranks of a training run twenty times; measure how long until the next step is done, and compare bits.

    python benchmarks/kills.py [--kills 20]

A checkpoint is taken every step, so the first checkpoint after a kill is the first step that was trained again.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from torchworker.contract import TrainRequest
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings
from train_and_ship.tasks.worker import call_worker

DIGITS = Path(__file__).parent.parent / "examples" / "digits"


def job_file(folder: Path) -> Path:
    """The digits job with a checkpoint every step, and enough steps to be killed in."""
    job = yaml.safe_load((DIGITS / "job.yaml").read_text())
    job["project"] = str(DIGITS)
    job["train"] |= {"epochs": 8, "checkpoint": {"steps": 1}, "restarts": 5}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def train(fork_server: ForkServer, folder: Path, kills: int) -> tuple[str, list[float], list[str]]:
    """SHA-256 of the weights, seconds from each kill to the next finished step, and what was said of each death."""
    job, project = load_job(job_file(folder))
    work = folder / "work"
    work.mkdir()
    request = TrainRequest(
        project=project_of(job, project),
        train=train_settings(job),
        folder=str(work),
        checkpoints=str(folder / "checkpoints"),
    )
    chance = random.Random(0)
    at = sorted(chance.sample(range(3, 175), kills))
    killed: list[float] = []
    seconds: list[float] = []
    causes: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "restarting":
            causes.append(event["cause"])
        if event["event"] != "checkpoint":
            return
        if len(causes) > len(seconds):
            seconds.append(time.monotonic() - killed[-1])
        if at and event["step"] >= at[0] and len(killed) == len(seconds):
            at.pop(0)
            victim = (work / f"heartbeat-rank{chance.randint(0, 1)}").read_text()
            killed.append(time.monotonic())
            os.kill(int(victim), signal.SIGKILL)

    asyncio.run(call_worker(fork_server, "train", request, work, on_event))
    weights = hashlib.sha256((work / "weights.safetensors").read_bytes()).hexdigest()
    return weights, seconds, causes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork_server = ForkServer(folder / "host.log")
        try:
            for run in ("whole", "killed"):
                (folder / run).mkdir()
            whole, _, _ = train(fork_server, folder / "whole", 0)
            weights, seconds, causes = train(fork_server, folder / "killed", kills)
        finally:
            fork_server.close()
    print(f"{len(seconds)} of {kills} kills recovered; weights {'identical' if weights == whole else 'DIFFERENT'}")
    print(
        f"seconds from kill to the next step: median {statistics.median(seconds):.2f}, "
        f"{min(seconds):.2f} to {max(seconds):.2f}"
    )
    print("causes named:", {cause: causes.count(cause) for cause in sorted(set(causes))})


if __name__ == "__main__":
    main()

"""A process that trains on an engine and says so line by line, which tests start on a host, watch and kill.

`python -m tests.support.launched_training JOB_FILE OPTIONS_JSON FOLDER` prints JSON objects with one key each:
`say`, `event`, then `done` (the attempt's folder) or `error` (class and message).
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import REPOSITORY
from torchworker.contract import RESULT, Reply, TrainRequest, TrainResult, decode
from train_and_ship.infra.errors import ShipError
from train_and_ship.registry.job.launcher import Launcher
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.launched import train_launched
from train_and_ship.tasks.requests import project_of, train_settings

SLOW = """
    import time
    original = build_dataset
    class Slow:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            time.sleep(0.05)
            return self.inner[index]
    def build_dataset(split):
        return Slow(original(split)) if split == "train" else original(split)
"""
"""Behind the code of a project: training takes a while, so that there is time to break something."""


def show(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def main(job_file: str, options: str, folder: str) -> None:
    job, project = load_job(Path(job_file))
    chosen = Launcher.model_validate(json.loads(options))
    request = TrainRequest(
        project=project_of(job, project), train=train_settings(job), folder="", checkpoints=f"{folder}/checkpoints"
    )
    task = asyncio.create_task(
        train_launched(
            chosen, request, Path(folder), job.digest(), lambda event: show(event=event), lambda text: show(say=text)
        )
    )
    # As Prefect does when a flow run is cancelled.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        show(done=str(await task))
    except asyncio.CancelledError:
        show(error="cancelled", kind="CancelledError")
    except ShipError as error:
        show(error=str(error), kind=type(error).__name__)


@dataclass
class Launched:
    """Such a process, from outside."""

    prefix: list[str]
    job_file: Path
    options: Mapping[str, Any]
    folder: Path
    environment: Mapping[str, str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> Launched:
        self.folder.mkdir(exist_ok=True)
        arguments = [str(self.job_file), json.dumps(self.options), str(self.folder)]
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "tests.support.launched_training", *arguments],
            cwd=REPOSITORY, env=dict(self.environment), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.began = time.monotonic()
        return self

    def until(self, key: str, event: str = "") -> Any:
        """Read on until a line with this key (and, of events, this kind); its value."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = json.loads(text)
            self.lines.append(line)
            if key in line and (not event or line[key]["event"] == event):
                return line[key]
            if "error" in line or "done" in line:
                break
        pytest.fail(f"ended without {event or key}: {json.dumps(self.lines[-3:])}")

    def ended(self) -> dict[str, Any]:
        """Read to the end; the last line."""
        assert self.process.stdout is not None
        self.lines += [json.loads(text) for text in self.process.stdout]
        self.process.wait()
        return self.lines[-1]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def quick(collective_seconds: float, **changes: Any) -> dict[str, Any]:
    """`train` of a job that notices a lost machine after this long."""
    known = {"epochs": 2, "processes": 2, "batch_size": 32, "collective_seconds": collective_seconds}
    return {**known, **changes}


def result_in(folder: str) -> TrainResult:
    result: TrainResult = decode(TrainResult, Reply.read(Path(folder) / RESULT).result)
    return result


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

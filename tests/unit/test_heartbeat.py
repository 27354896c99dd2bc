"""A silent process is told from outside: one that computes, one that is stopped, one that does nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.projects import write_project
from torchworker.contract import TrainSettings
from torchworker.process import phase
from torchworker.training.heartbeat import Watched
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import train_settings

BUSY, IDLE = "while True: pass", "import time; time.sleep(60)"


def settings(tmp_path: Path, hang: float, build: float) -> TrainSettings:
    train = {"epochs": 1, "hang_seconds": hang, "build_seconds": build}
    return train_settings(load_job(write_project(tmp_path / "p", train=train))[0])


@contextmanager
def running(code: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def hung_within(watched: Watched, seconds: float) -> str:
    """Why it is taken for dead, looked at every 50 ms."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if why := watched.hung():
            return why
        time.sleep(0.05)
    return ""


def test_who_computes_is_busy_and_who_does_nothing_is_dead_by_hang_seconds(tmp_path: Path) -> None:
    limits = settings(tmp_path, 0.4, 60)
    with running(BUSY) as busy, running(IDLE) as idle:
        computes, sleeps = Watched(busy, limits), Watched(idle, limits)
        why = hung_within(sleeps, 3)
        assert why.startswith("was silent for ") and "train.hang_seconds is 0.4" in why and "did nothing" in why
        assert hung_within(computes, 0.6) == ""
        os.kill(busy, signal.SIGSTOP)
        why = hung_within(computes, 3)
        assert "train.hang_seconds is 0.4" in why and "stopped by a signal" in why


def test_computing_in_one_call_and_building_have_their_own_limit(tmp_path: Path) -> None:
    limits = settings(tmp_path, 0.1, 0.8)
    with running(BUSY) as busy, running(IDLE) as idle:
        computes, builds = Watched(busy, limits), Watched(idle, limits)
        builds.building = True
        assert hung_within(builds, 0.4) == ""
        assert "train.build_seconds is 0.8, and it was making its model or data" in hung_within(builds, 3)
        assert "train.build_seconds is 0.8, and it computed in one call" in hung_within(computes, 3)


def test_a_beat_is_a_sign_of_life(tmp_path: Path) -> None:
    with running(IDLE) as idle:
        watched = Watched(idle, settings(tmp_path, 0.3, 60))
        for _ in range(10):
            time.sleep(0.05)
            watched.beats()
            assert watched.hung() == ""
        assert hung_within(watched, 3)


def test_making_a_model_is_said_from_its_beginning_to_its_end() -> None:
    said: list[bool] = []
    phase.add_watcher(said.append)
    try:
        with phase.building(), phase.building():
            pass
        assert said == [False, True, True, True, False]
    finally:
        phase._watchers.remove(said.append)

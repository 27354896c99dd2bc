"""Servers of a team, which ask for an account."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.projects import REPOSITORY
from train_and_ship.infra.settings import LOOPBACK

ACCOUNT = ("team", "a long password")


def at(port: int) -> tuple[str, ...]:
    return ("--host", LOOPBACK, "--port", str(port))


@contextmanager
def process(folder: Path, name: str, variables: Mapping[str, str], module: str, *arguments: str) -> Iterator[None]:
    """One server or worker, until the end of the block."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PREFECT_API_URL", "PREFECT_HOME")}
    with (folder / f"{name}.log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            cwd=REPOSITORY,
            env={**environment, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        running.terminate()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + 150
    while True:
        try:
            if httpx.get(url, timeout=5, auth=ACCOUNT).is_success:
                return
        except httpx.HTTPError:
            assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.3)

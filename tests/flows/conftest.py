from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.objectstore import ObjectStore
from infra.settings import Settings
from registry.bucket import read_pointer
from tests.projects import REPOSITORY


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def command(stack: Settings) -> Command:
    """Run an installed command from the repository against the stack; variables given by name are added."""

    def run(*argv: str, **variables: str) -> Ended:
        done = subprocess.run(
            [Path(sys.executable).with_name(argv[0]), *argv[1:]],
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=200,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def store(stack: Settings) -> ObjectStore:
    return ObjectStore.from_settings(stack)


def live(store: ObjectStore, model: str) -> tuple[int, str] | None:
    """(generation, release) on prod."""
    pointer = read_pointer(store, model, "prod")
    return (pointer.generation, pointer.release) if pointer else None


def orphans() -> list[str]:
    """Worker processes on this machine whose flow process is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if "torchworker.host" in words and process.info["ppid"] == 1:
            found.append(" ".join(words))
    return found

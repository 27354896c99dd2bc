"""What a tester is told: how long it takes, what is not asked here and why, and where a failure's files are."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.projects import REPOSITORY

MINUTES = {"make test": 12, "make soak": 40}
"""On two cores, tools installed; docs/testing.md has the table."""
KEPT = REPOSITORY / "build" / "failed-tests"
KEPT_SUFFIXES = {".log", ".json", ".jsonl", ".html", ".md", ".png", ".yaml", ".txt"}
KEPT_BYTES = 4_000_000
"""A larger file is no log or report."""
KEPT_SECONDS = 900
"""What was not written to for so long belongs to tests of before."""

_Here = Callable[[], bool]


def _command(*names: str) -> _Here:
    return lambda: any(shutil.which(name) is not None for name in names)


def _root() -> bool:
    return os.geteuid() == 0


OPTIONAL: dict[str, tuple[_Here, str]] = {
    "a C++ compiler": (_command(os.environ.get("CXX", "c++"), "g++"), "the C++ runner and AOTInductor"),
    "ExecuTorch (pip install executorch==1.5.1)": (
        lambda: importlib.util.find_spec("executorch") is not None,
        "programs for devices",
    ),
    "Chromium": (_command("chromium"), "reports in a browser"),
    "Slurm": (_command("slurmctld"), "jobs under Slurm"),
    "root": (_root, "several hosts, Slurm, a full disk, PostgreSQL's installation"),
    "ip (Debian: iproute2)": (_command("ip"), "several hosts"),
    "npm": (_command("npm"), "a store that ignores conditions"),
    "openssl": (_command("openssl"), "a signature checked by hand"),
}
"""What tests need that setting up the environment does not bring, whether it is here, and what is not asked without."""


def told_before(marks: str) -> list[str]:
    """How long it takes, and what this machine lacks for it. marks: which tests are asked, as pytest's -m says it."""
    target = "make soak" if marks == "soak" else "make test"
    lines = [f"{target} takes about {MINUTES[target]} minutes on two cores; ARGS='-k rollback' asks for a part"]
    lines += [f"skipped, because there is no {name}: {asks}" for name, (here, asks) in OPTIONAL.items() if not here()]
    return lines


def keep_files(test: str, folders: list[Path], said: str) -> Path:
    """Copy the logs, reports and screenshots below some folders, and what the test said, to a folder of the test's.

    Returns it. What is kept of an earlier failure of the same test is replaced.
    """
    kept = KEPT / re.sub(r"[^\w.-]+", "_", test)[-150:]
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    (kept / "said.txt").write_text(said)
    for folder in folders:
        for path in _told(folder):
            target = kept / folder.name / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            # A server may just be replacing it.
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, target)
    return kept


def _told(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if path.suffix in KEPT_SUFFIXES and path.is_file():
                about = path.stat()
                if about.st_size <= KEPT_BYTES and about.st_mtime > time.time() - KEPT_SECONDS:
                    yield path

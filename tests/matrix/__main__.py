"""The core of the suite in an environment for every version that is promised; writes docs/versions.md's table.

    python -m tests.matrix                 # every row, some minutes each
    python -m tests.matrix --row 3.13      # one; the others keep their lines

Rows are declared in tests/support/matrix.py. An interpreter is found by its name (python3.13) on PATH or among pyenv's
versions. Environments, logs and junit files are in build/matrix/. With uv on PATH, environments share files; what it
downloads is kept in build/matrix/cache. What pip is told by PIP_FIND_LINKS, uv is told too.

Exits with 1 when a row that could be run is not green.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import write
from tests.support.matrix import (
    CORE,
    CORE_OPTIONS,
    EXTRAS,
    GO_WITH_TORCH,
    PAGE,
    REPOSITORY,
    ROWS,
    SHOWN,
    Answer,
    Row,
    chosen,
    table,
)

PLACE = REPOSITORY / "build" / "matrix"
CORE_SECONDS = 2400
"""A row that takes longer has failed: it hangs, or the machine is far too busy."""
ASK = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
if "torch" in found:
    import torch
    found["torch"] = torch.__version__
print(json.dumps([platform.python_version(), found]))
"""


class CannotRunError(Exception):
    """Why a row is not run."""


def main() -> int:
    """Ask the rows that are named, and write the table after each."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--row", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--core", nargs="+", default=CORE, help="other tests, to look closer; nothing is written")
    asked = parser.parse_args()
    try:
        rows = chosen(ROWS, asked.row)
    except ValueError as error:
        parser.error(str(error))
    green = True
    for row in rows:
        answer = _asked(row, asked.core)
        if asked.core == CORE:
            write(PAGE, "matrix", table(ROWS, {row.name: answer}, PAGE.read_text()))
        told = answer.why_not or f"{answer.tests} tests, {answer.skipped} skipped, failed: {list(answer.failed)}"
        print(f"{row.name}: {told}", flush=True)
        green &= answer.green or answer.versions is None
    return 0 if green else 1


def _asked(row: Row, core: tuple[str, ...] | list[str]) -> Answer:
    today = f"{datetime.date.today()}"
    try:
        python = _environment(row)
    except CannotRunError as error:
        return Answer(date=today, why_not=str(error))
    version, versions = json.loads(_output([python, "-c", ASK, *SHOWN, *GO_WITH_TORCH]))
    report = PLACE / f"{row.name}.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    why_not = _run(python, core, report)
    seconds = time.monotonic() - began
    tests, skipped, failed = _read(report)
    return Answer(
        date=today,
        python=version,
        versions=versions,
        gigabytes=_gigabytes(PLACE / row.name),
        tests=tests,
        skipped=skipped,
        failed=failed,
        seconds=seconds,
        why_not=why_not,
    )


# ---- the environment


def _environment(row: Row) -> Path:
    """The interpreter of the row's environment, made anew when something else is asked of it than before."""
    interpreter = _interpreter(row.python)
    home = PLACE / row.name
    python = home / "bin" / "python"
    key = home / "asked"
    wanted = _key(row, interpreter)
    if key.exists() and key.read_text() == wanted:
        return python
    print(f"{row.name}: making {home.relative_to(REPOSITORY)} with {interpreter}", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    _output([interpreter, "-m", "venv", home])
    folders = ["./torchworker", "./shipreader", f".[{','.join(EXTRAS)}]"]
    arguments = [*(word for folder in folders for word in ("--editable", folder)), row.torch]
    if row.constraints:
        arguments += ["--constraint", _constraints()]
    _output([*_installer(python), *arguments])
    key.write_text(wanted)
    return python


def _interpreter(version: str) -> str:
    """The first that answers to its name with its version: pyenv's names on PATH answer only for what is chosen."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = (Path(folder) / f"python{version}" for folder in os.environ["PATH"].split(os.pathsep) if folder)
    for candidate in (*on_path, *sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))):
        if candidate.exists():
            asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.stdout.strip() == version:
                return str(candidate)
    raise CannotRunError(f"no python{version} found")


def _key(row: Row, interpreter: str) -> str:
    """Of all that decides what is installed."""
    decides = []
    for folder in (".", "torchworker", "shipreader"):
        project = tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text())["project"]
        decides += [project.get(name) for name in ("dependencies", "optional-dependencies", "scripts", "entry-points")]
    constraints = _constraints().read_text() if row.constraints else ""
    version = _output([interpreter, "-c", "import sys; print(sys.version)"])
    return hashlib.sha256(repr((row, EXTRAS, version, decides, constraints)).encode()).hexdigest()


def _constraints() -> Path:
    """constraints.txt without torch, which the row names."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines(keepends=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    path = PLACE / "constraints.txt"
    path.write_text("".join(line for line in lines if not line.startswith("torch==")))
    return path


def _installer(python: Path) -> list[str | Path]:
    uv = shutil.which("uv")
    if uv is None:
        return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    cache = os.environ.get("UV_CACHE_DIR", PLACE / "cache")
    told = [word for link in links for word in ("--find-links", link)]
    return [uv, "pip", "install", "--quiet", "--cache-dir", cache, "--python", python, *told]


def _output(command: list[str | Path]) -> str:
    """What a command prints. Raises CannotRunError with the end of what it said when it fails."""
    done = subprocess.run(command, cwd=REPOSITORY, env=_variables(), capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()).replace("|", "/")
        end = said if len(said) < 300 else f"… {said[-300:].partition(' ')[2]}"
        raise CannotRunError(f"`{Path(command[0]).name}` ended with {done.returncode}: {end}")
    return done.stdout


def _gigabytes(folder: Path) -> float:
    """A file counts once, however many names it has here."""
    found = {
        (about.st_dev, about.st_ino): about.st_size
        for path in folder.rglob("*")
        if not path.is_symlink() and path.is_file()
        for about in [path.stat()]
    }
    return sum(found.values()) / 1e9


# ---- the core


def _variables() -> dict[str, str]:
    """Ours, without what would show another checkout or keep modules from being compiled."""
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def _run(python: Path, core: tuple[str, ...] | list[str], report: Path) -> str:
    """Run pytest; returns why it did not come to its end, or nothing. What it prints is kept beside its report."""
    argv = [python, "-m", "pytest", *CORE_OPTIONS, "--numprocesses", "3", "--no-loadscope-reorder"]
    argv += ["--junitxml", report, *core]
    with report.with_suffix(".log").open("w") as log:
        running = subprocess.Popen(argv, cwd=REPOSITORY, env=_variables(), stdout=log, stderr=subprocess.STDOUT)
        try:
            status = running.wait(CORE_SECONDS)
        except subprocess.TimeoutExpired:
            # As Ctrl-C does it, so that servers are stopped and folders removed.
            running.send_signal(signal.SIGINT)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
            return f"not at its end after {CORE_SECONDS} s"
    # 1: tests failed, which the report tells.
    return "" if status in (0, 1) else f"pytest ended with {status}, see {report.with_suffix('.log').name}"


def _read(report: Path) -> tuple[int, int, tuple[str, ...]]:
    """How many tests, how many of them skipped, and the names of those that failed."""
    cases = list(_cases(report))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases), skipped, tuple(dict.fromkeys(_name(case) for case in failed))


def _cases(report: Path) -> Iterator[xml.etree.ElementTree.Element]:
    if report.exists():
        yield from xml.etree.ElementTree.parse(report).getroot().iter("testcase")


def _name(case: xml.etree.ElementTree.Element) -> str:
    return f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"


if __name__ == "__main__":
    sys.exit(main())

"""Which seeded faults the tests notice: the list is drawn once, and asked again when tests change.

    python -m tests.mutation draw --killed 40 --tree A --tree B    # until the tests failed for 40; writes faults.json
    python -m tests.mutation check --tree A --tree B [--soak]      # the same faults against `make test`, `make soak`

Drawing is quicker when only the tests that reach a fault are asked. `--coverage FILE` is what `coverage combine` makes
of a whole run with `context = ${PYTEST_CURRENT_TEST-none}`, `parallel = true` and `patch = _exit, fork`, in which a
plugin calls `switch_context` for each test. What no test reaches is not noticed by any.

A tree is a clone of its own with its environment (`git clone . A && make -C A .venv/.ready`); faults are put into trees
and never into this checkout, one at a time in each. A run stops at its first failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.import_graph import graph, module_name
from tests.support.mutation import Fault, draw
from tests.support.projects import REPOSITORY

FAULTS = Path(__file__).parent / "faults.json"
SEED = 14
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
DRAW_SECONDS = 120
"""How long the suite is asked about a fault when the list is drawn; what is not noticed by then is told as such."""
CHECK_SECONDS = 300
"""How long the test that noticed a fault then is asked alone; a test that fails alone fails in the whole."""
NEAR = {
    "flows": ("flows", "services"),
    "tasks": ("flows", "services", "exports"),
    "registry": ("unit", "services", "flows"),
    "infra": ("unit", "services", "flows"),
    "ship": ("services", "flows", "unit"),
    "torchworker": ("unit", "exports", "distributed", "flows"),
    "shipreader": ("unit", "services"),
}
"""Folders of tests that are asked first, by the package that has the fault."""
LONG = ("test_readme.py", "test_several_hosts.py", "test_slurm.py", "test_zoo.py", "test_team_server.py")
"""Asked last."""


def main() -> None:
    """Draw or check, as the command says."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("what", choices=("draw", "check"))
    parser.add_argument("--killed", type=int, default=40)
    parser.add_argument("--tree", type=Path, action="append", required=True)
    parser.add_argument("--soak", action="store_true", help="ask `make soak` about what `make test` does not notice")
    parser.add_argument("--coverage", type=Path, help="which tests reach which lines: data of coverage.py, as below")
    asked = parser.parse_args()
    if asked.what == "draw":
        _draw(asked.killed, asked.tree, Reached(asked.coverage))
    else:
        _check(asked.tree, asked.soak)


def _drawn(known: set[str]) -> Iterator[Fault]:
    """One fault a module, in a drawn order, without the modules that have one."""
    modules = sorted(file for file in graph() if not file.endswith("__init__.py"))
    random.Random(SEED).shuffle(modules)
    for module in modules:
        # A seed a module: a module that changes does not change the others' faults.
        fault = draw(module, (REPOSITORY / module).read_text(), random.Random(f"{SEED} {module}"))
        if fault is not None and module not in known:
            yield fault


class Reached:
    """Which tests reach a fault."""

    def __init__(self, data: Path | None) -> None:
        self._data: Any = None
        if data is not None:
            # A tool for drawing only, so it is in no environment of ours.
            self._data = importlib.import_module("coverage").CoverageData(str(data))
            self._data.read()

    def tests(self, fault: Fault) -> list[str]:
        """What to ask, those first that are near it: files, or tests of a file that reach it in their own process."""
        every = _nearest_first(fault)
        if self._data is None:
            return every
        named = [name for name in self._data.measured_files() if name.endswith(f"/{fault.module}")]
        by_line = self._data.contexts_by_lineno(min(named, key=len)) if named else {}
        lines = range(fault.line, fault.line + len(fault.was.splitlines()))
        found: dict[str, set[str]] = {}
        for context in {context for line in lines for context in by_line.get(line, ())}:
            test = context.rpartition("|")[2]
            file = test.partition("::")[0]
            # A process that was started by a test may serve the whole file.
            found.setdefault(file, set()).add(test if "|" in context else file)
        return [
            test
            for file in every
            if file in found
            for test in ([file] if file in found[file] or len(found[file]) > 20 else sorted(found[file]))
        ]


def _draw(wanted: int, trees: list[Path], reached: Reached) -> None:
    found: list[dict[str, Any]] = json.loads(FAULTS.read_text()) if FAULTS.exists() else []
    faults, lock = _drawn({entry["module"] for entry in found}), threading.Lock()
    killed = sum(entry["noticed_by"] is not None for entry in found)

    def work(tree: Path) -> None:
        nonlocal killed
        while killed < wanted:
            with lock:
                fault = next(faults, None)
            if fault is None:
                return
            began = time.monotonic()
            asked = reached.tests(fault)
            by = _noticed_by(tree, fault, ["-n0", *asked], DRAW_SECONDS) if asked else None
            with lock:
                found.append({**dataclasses.asdict(fault), "noticed_by": by})
                killed += by is not None
                FAULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(
                    f"{killed} {fault.module}:{fault.line} {fault.kind}: {by}, "
                    f"{len(asked)} asked, {time.monotonic() - began:.0f} s",
                    flush=True,
                )

    _in_each(trees, work)


def _check(trees: list[Path], soak: bool) -> None:
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    listed = [entry for entry in json.loads(FAULTS.read_text()) if entry["noticed_by"]]
    for entry in listed:
        waiting.put(entry)
    seen: dict[str, str | None] = {}

    def work(tree: Path) -> None:
        while True:
            try:
                entry = waiting.get_nowait()
            except queue.Empty:
                return
            fault = Fault(**{field.name: entry[field.name] for field in dataclasses.fields(Fault)})
            # What noticed it then, as far as it is asked today, without the parameters.
            first = [test] if (test := entry["noticed_by"].partition("[")[0]).startswith("tests/") else ["tests/unit"]
            by = _noticed_by(tree, fault, ["-n0", *first], CHECK_SECONDS) or _made(tree, fault, "test")
            if by is None and soak:
                by = _made(tree, fault, "soak")
            seen[fault.module] = by
            print(f"{fault.module}:{fault.line} {fault.kind}: {by or 'NOT NOTICED'}", flush=True)

    _in_each(trees, work)
    print(f"noticed: {sum(by is not None for by in seen.values())} of {len(listed)}")


def _in_each(trees: list[Path], work: Any) -> None:
    threads = [threading.Thread(target=work, args=(tree.resolve(),)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _noticed_by(tree: Path, fault: Fault, arguments: list[str], seconds: float) -> str | None:
    """The first test that fails; None when none does in that time."""
    before = fault.put(tree)
    try:
        argv = [str(tree / ".venv/bin/python"), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
        with subprocess.Popen(
            argv, cwd=tree, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running:
            # As Ctrl-C does it, so that servers are stopped and folders removed.
            timer = threading.Timer(seconds, running.send_signal, [signal.SIGINT])
            timer.start()
            said = running.communicate()[0]
            out_of_time = not timer.is_alive()
            timer.cancel()
        return None if out_of_time else _first_failure(said, running.returncode)
    finally:
        (tree / fault.module).write_text(before)


def _made(tree: Path, fault: Fault, target: str) -> str | None:
    before = fault.put(tree)
    try:
        argv = ["make", target, "ARGS=-x"]
        done = subprocess.run(argv, cwd=tree, env=_environment(), capture_output=True, text=True)
        return f"make {target}: {_first_failure(done.stdout, 1)}" if done.returncode else None
    finally:
        (tree / fault.module).write_text(before)


def _environment() -> dict[str, str]:
    """Ours, without a path that would show the tree's processes another checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _first_failure(said: str, status: int) -> str | None:
    failed = FAILED.search(said)
    if failed is not None:
        return failed[1]
    # 1: failures, 2: stopped, 3 and 4: it could not even begin. 5: there is no such test any more, or it is soak.
    return None if status in (0, 5) or "not found:" in said else f"pytest: {said[-200:]}"


def _nearest_first(fault: Fault) -> list[str]:
    """Every test file: those first that name the module, then those of its kind."""
    name, words = module_name(fault.module), set(fault.module.removesuffix(".py").split("/")[1:])
    near = NEAR[fault.module.split("/")[0]]

    def distance(path: Path) -> tuple[bool, bool, int, int, str]:
        file = path.relative_to(REPOSITORY).as_posix()
        folder = file.split("/")[1]
        alike = words & set(re.split(r"[/_.]", file))
        place = near.index(folder) if folder in near else len(near)
        return path.name in LONG, name not in path.read_text(), -len(alike), place, file

    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"), key=distance)
    return [path.relative_to(REPOSITORY).as_posix() for path in paths]


if __name__ == "__main__":
    main()

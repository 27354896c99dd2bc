"""Processes that this project starts and stops."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.support.processes import eventually
from train_and_ship.infra.processes import Program, start, stop

DEPTH = 8
CHAIN = f"""
import os, time
for _ in range({DEPTH}):
    if os.fork():
        break
    os.setsid()
time.sleep(600)
"""
"""Each the parent of the next one, which has a session of its own, as a launcher's processes have."""


def test_a_family_is_signalled_from_the_eldest_on(tmp_path: Path) -> None:
    program = Program(
        name="nested",
        argv=[sys.executable, "-S", "-c", CHAIN],
        environment={"PATH": os.environ["PATH"]},
        folder=tmp_path,
    )
    record = start(program, tmp_path / "log", tmp_path / "pid.json")
    try:
        eventually(lambda: len(record.family()) == DEPTH + 1, "all of them")
        family = record.family()
        assert family[0].pid == record.pid
        assert [process.ppid() for process in family[1:]] == [process.pid for process in family[:-1]]
    finally:
        assert stop([tmp_path / "pid.json"]) == ["nested"]
    assert record.family() == []

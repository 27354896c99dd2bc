"""A tester sees what happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import telling
from tests.support.projects import REPOSITORY


def test_what_is_skipped_is_told_before_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    told = telling.told_before("soak")
    assert told[0].startswith("make soak takes about") and "minutes on two cores" in told[0]
    assert telling.told_before("not soak")[0].startswith("make test takes about")
    assert "skipped, because there is no Slurm: jobs under Slurm" in told


def test_the_files_of_a_test_that_failed_are_kept_and_their_folder_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "test_wrong.py"
    file.write_text(
        textwrap.dedent("""
        pytest_plugins = ["tests.conftest"]

        def test_wrong(tmp_path):
            (tmp_path / "stage.log").write_text("what happened")
            (tmp_path / "weights.bin").write_text("not a report")
            assert 1 == 2
        """)
    )
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        argv, cwd=tmp_path, env={**environment, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    said = next(line for line in done.stdout.splitlines() if "logs, reports and screenshots: " in line)
    kept = Path(said.partition("screenshots: ")[2])
    assert kept.parent == telling.KEPT
    assert [path.name for path in kept.rglob("*.log")] == ["stage.log"]
    assert not list(kept.rglob("*.bin"))
    assert "assert 1 == 2" in (kept / "said.txt").read_text()
    shutil.rmtree(kept)

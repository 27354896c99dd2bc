"""A tester sees what happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import must_run, telling
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


def test_what_ci_has_to_run_is_named_by_its_reason_and_a_skip_that_nobody_knows_counts() -> None:
    reasons = {
        "no Slurm: slurmctld not installed (Debian: apt-get …)": "slurm",
        "no chromium on this machine (Debian: apt-get install chromium)": "chromium",
        "ExecuTorch is not installed: pip install executorch==1.5.1": "executorch",
        "could not import 'executorch': No module named 'executorch'": "executorch",
        "there is no C++ runner here: no C++ compiler on this machine": "gcc",
        "Ceph RGW comes from Debian's packages, and this machine has no apt-get": "rgw",
        "apt-get cannot fetch radosgw, ceph-mon, ceph-osd: …": "rgw",
        "network namespaces need root": "hosts",
        "PostgreSQL is not installed, and apt-get cannot install it here": "postgresql",
        "npm cannot fetch s3rver: …": "npm",
        "serving: pip cannot install it here: …": "packages",
        "the moon is full": "",
        "MLServer 1.7.1 wants Python below 3.13": None,
        "Ceph RGW 16 is refused": None,
    }
    assert {reason: must_run.group_of(reason) for reason in reasons} == reasons
    assert must_run.asked(None, [("CI", "1")]) == must_run.asked("all", []) == set(must_run.GROUPS)
    assert must_run.asked(None, []) == must_run.asked("", [("CI", "true")]) == set()
    assert must_run.asked("rgw, slurm", []) == {"rgw", "slurm"}
    with pytest.raises(pytest.UsageError, match=r"expected some of slurm, .*got moon"):
        must_run.asked("moon", [])
    # What continuous integration writes.
    named = re.search(r"^groups=(\S+)$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert named is not None and must_run.asked(named[1], []) == set(must_run.GROUPS)


@pytest.mark.parametrize(
    ("words", "status"),
    [([], 0), (["--must-run", "all"], 1), (["--must-run", "rgw"], 0), (["--must-run", "slurm", "-n", "1"], 1)],
)
def test_a_group_that_was_skipped_fails_a_run_that_had_to_ask_it(tmp_path: Path, words: list[str], status: int) -> None:
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent("""
        from tests.support.must_run import MustRun, asked

        def pytest_addoption(parser):
            parser.addoption("--must-run")

        def pytest_configure(config):
            if not hasattr(config, "workerinput") and (groups := asked(config.getoption("--must-run"), [])):
                config.pluginmanager.register(MustRun(groups))
        """)
    )
    (tmp_path / "test_one.py").write_text(
        "import pytest\n\ndef test_jobs():\n    pytest.skip('no Slurm: slurmd not installed')\n\n"
        "def test_other():\n    pass\n"
    )
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*argv, *words],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    told = "FAILED: 1 of group slurm had to run and were skipped: no Slurm: slurmd not installed"
    assert (told in done.stdout) == bool(status)

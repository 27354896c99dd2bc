"""A flow that died goes on where it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.channels import live
from tests.support.fixture_types import Command, Ship
from tests.support.html_pages import checked
from tests.support.ports import free_port
from tests.support.processes import PATIENCE, orphans
from tests.support.projects import REPOSITORY, SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings

ASKS_A_FILE = """
    import os
    from pathlib import Path
    class Asks(nn.Linear):
        def forward(self, x):
            # Ranks have RANK; the export process has not.
            if "RANK" not in os.environ and Path(__file__).with_name("broken").exists():
                raise RuntimeError("not today")
            return super().forward(x)
    def build_model():
        return Asks(4, 3)
"""


def test_a_flow_killed_in_training_goes_on_from_its_checkpoint(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    train = {"epochs": 4, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
    job = write_project(tmp_path, extra=SLOW, name="killed", train=train, export={"formats": ["torchscript"]})
    flow = subprocess.Popen(
        [Path(sys.executable).with_name("ship"), "run", str(job)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE
    while not (saved := sorted((stack.runs / "killed").glob("*/checkpoints/step-????????"))):
        assert flow.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    run_id = saved[0].parent.parent.name
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans() == []
    assert live(store, "killed") is None

    ended = ship("run", str(job), "--resume", run_id)
    assert ended.status == 0, ended.text
    assert re.search(r"resumed from step \d+ of 12", ended.text)
    assert live(store, "killed") is not None


def test_a_complete_stage_is_verified_and_not_repeated(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    job = write_project(
        tmp_path,
        extra=ASKS_A_FILE,
        name="mended",
        train={"epochs": 1, "processes": 1, "batch_size": 32},
        export={"formats": ["torchscript"]},
    )
    (tmp_path / "broken").touch()
    first = ship("run", str(job))
    assert first.status == 2 and "not today" in first.errors, first.text
    (run,) = (path for path in (stack.runs / "mended").iterdir() if path.is_dir())
    weights = (run / "train" / "weights.safetensors").stat().st_mtime_ns

    (tmp_path / "broken").unlink()
    second = ship("run", str(job), "--resume", run.name)
    assert second.status == 0, second.text
    assert "train: already complete in this run, verified by hash" in second.text
    assert (run / "train" / "weights.safetensors").stat().st_mtime_ns == weights
    assert live(store, "mended") is not None


@pytest.mark.soak
def test_a_training_whose_mlflow_stayed_away_is_not_lost_nor_what_it_warned_of(
    command: Command, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    quick = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "export": {"formats": ["torchscript"]}}
    warns = """
        import warnings
        original = build_model
        def build_model():
            warnings.warn("take the new model", FutureWarning)
            return original()
    """
    job = write_project(tmp_path, extra=warns, **quick, name="awaited")
    # In processes of their own: MLflow remembers the address that it was at.
    nobody = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "SHIP_MLFLOW_WAIT_SECONDS": "3"}
    ended = command("ship", "run", str(job), **nobody)
    assert ended.status == 1 and "Traceback" not in ended.text, ended.text
    assert ended.text.count("wait up to 3 s for it") == 1 and live(store, "awaited") is None
    (run,) = (path.name for path in (stack.runs / "awaited").iterdir() if path.is_dir())
    assert f"--resume {run}" in ended.text and "Nothing is lost" in ended.text

    again = command("ship", "run", str(job), "--resume", run)
    assert again.status == 0 and "train: already complete in this run" in again.text, again.text
    assert live(store, "awaited") is not None
    # What was shown while it trained is in the report all the same.
    report = checked((stack.runs / "awaited" / run / "report.html").read_text())
    assert "FutureWarning: take the new model" in report.text and "train, export" in report.text


def test_a_run_that_does_not_exist_cannot_be_resumed(ship: Ship) -> None:
    ended = ship("run", "examples/digits/job.yaml", "--resume", "../..")
    assert ended.status == 2
    assert "resume: expected the id of a run in" in ended.errors and "Traceback" not in ended.text


def test_an_old_run_that_is_gone_on_with_does_not_replace_what_a_later_one_put_live(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    train = {"epochs": 1, "processes": 1, "batch_size": 32}
    job = write_project(tmp_path, extra=ASKS_A_FILE, name="fenced", train=train, export={"formats": ["torchscript"]})
    (tmp_path / "broken").touch()
    old = ship("run", str(job))
    assert old.status == 2, old.text
    (run,) = (path for path in (stack.runs / "fenced").iterdir() if path.is_dir())
    (tmp_path / "broken").unlink()
    later = ship("run", str(job))
    assert later.status == 0, later.text
    promoted = live(store, "fenced")

    stale = ship("run", str(job), "--resume", run.name)
    assert stale.status == 2 and "comes from a run that began later" in stale.errors, stale.text
    assert "Traceback" not in stale.text and live(store, "fenced") == promoted

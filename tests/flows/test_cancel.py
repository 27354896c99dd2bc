"""Cancelling a run in Prefect while it trains."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.html_pages import checked
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE, eventually
from tests.support.projects import REPOSITORY, SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import FAILED, read_decisions
from train_and_ship.tasks.stopping import STOPPED


def workers_of(run: Path) -> list[psutil.Process]:
    """Processes that have a file of the run open or in their arguments: agent and ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            files = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any(path.startswith(str(run)) for path in files):
            found.append(process)
    return found


def epochs(run: Path) -> int:
    """How many have been reported."""
    events = run / "train.work" / "events.jsonl"
    return events.read_text().count('"event": "epoch"') if events.exists() else 0


def test_cancelling_in_prefect_ends_every_process_and_leaves_a_checkpoint_to_go_on_from(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    train = {"epochs": 4, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
    job = write_project(tmp_path, extra=SLOW, name="cancelled", train=train, export={"formats": ["torchscript"]})
    api = Api(stack)
    started = api.start("train-and-ship", job=str(job))
    run = stack.runs / "cancelled" / started
    deadline = time.monotonic() + PATIENCE
    # An epoch, for the report to have something to tell of.
    while not (list(run.glob("checkpoints/step-????????")) and epochs(run)):
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.1)
    assert workers_of(run)

    # As `prefect flow-run cancel` does.
    api.ask("POST", f"/flow_runs/{started}/set_state", {"state": {"type": "CANCELLING"}})
    while workers_of(run):
        assert time.monotonic() < deadline + 60, "processes of the run are still there"
        # Each look opens what /proc tells of every process.
        time.sleep(0.5)
    assert live(store, "cancelled") is None
    while not (run / "report.html").exists():
        assert time.monotonic() < deadline + 60, "no report says that it was cancelled"
        time.sleep(0.1)
    report = checked((run / "report.html").read_text())
    assert "cancelled: cancelled" in report.text and "Training did not end" in report.text

    # As it is now, with fewer epochs left than the whole.
    again = ship("run", str(job), "--resume", started)
    assert again.status == 0, again.text
    assert re.search(r"resumed from step \d+ of 12", again.text)


@pytest.mark.parametrize(
    ("name", "at"),
    [("run", "in training"), pytest.param("retrain", "while a person is asked", marks=pytest.mark.soak)],
)
def test_a_run_of_a_terminal_that_is_stopped_in_prefect_ends_there_and_nothing_goes_live(
    stack: Settings, store: ObjectStore, tmp_path: Path, name: str, at: str
) -> None:
    model, trains = f"stopped-{name}", at == "in training"
    job = write_project(
        tmp_path,
        extra=SLOW if trains else "",
        name=model,
        train={"epochs": 200 if trains else 1, "processes": 2 if trains else 1, "batch_size": 32},
        export={"formats": ["torchscript"]},
        release={} if trains else {"approval": "required"},
    )
    api = Api(stack)
    command = subprocess.Popen(
        [Path(sys.executable).with_name("ship"), name, str(job)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    folder = stack.runs / model
    eventually(lambda: list(folder.glob("*-*")) or command.poll() is not None, "the run")
    (run,) = folder.glob("*-*")
    if trains:
        eventually(lambda: epochs(run) or command.poll() is not None, "an epoch")
        assert workers_of(run)
    else:
        api.wait(run.name, "Paused")

    api.ask("POST", f"/flow_runs/{run.name}/set_state", {"state": {"type": "CANCELLING"}})
    said, _ = command.communicate(timeout=PATIENCE)
    assert command.returncode == 1 and STOPPED in said and "Traceback" not in said, said
    ended = api.ask("GET", f"/flow_runs/{run.name}")["state"]
    assert (ended["name"], ended["message"]) == ("Cancelled", STOPPED)
    assert not workers_of(run) and live(store, model) is None
    report = checked((run / "report.html").read_text())
    assert "cancelled" in report.text and STOPPED in report.text
    if name == "retrain":
        decided = read_decisions(Channel(store, model), 1)[-1]
        assert (decided.decision, decided.why) == (FAILED, STOPPED)

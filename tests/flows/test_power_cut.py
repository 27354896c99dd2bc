"""The worker, the servers and at last the whole machine die under a run; it goes on where it was."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.flow_runs import STAGES
from tests.support.local_stack import stack_environment
from tests.support.ports import free_ports
from tests.support.power_cut import Left, recorded, states
from tests.support.prefect_api import Api
from tests.support.processes import eventually, kill, processes_of, run_command
from tests.support.projects import SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.processes import PidFile
from train_and_ship.infra.rundir import MANIFEST
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.tracking.connection import connect

MODEL = "powerless"


def ship(*words: str) -> None:
    done = run_command("ship", *words)
    assert done.status == 0, done.text


def retry(run: str) -> None:
    done = run_command("prefect", "flow-run", "retry", run)
    assert done.status == 0, done.text


def lose(settings: Settings, component: str) -> None:
    """SIGKILL for one server or the worker, and for what it has started."""
    record = PidFile.read(settings.home / "pids" / f"{component}.json")
    assert record is not None
    kill(record.family())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A stack of its own, which can lose power."""
    for name, value in stack_environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    # A listener of the local S3 server that has a port of its own.
    monkeypatch.setenv("IOT_MTLS_PORT", str(free_ports(1)[0]))
    try:
        ship("up")
        yield Settings.load()
    finally:
        ship("down")


# `services/test_stack.py` kills components, `test_resume.py` a flow, one at a time.
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_outlives_its_worker_its_servers_and_the_machine(machine: Settings, tmp_path: Path) -> None:
    train = {"epochs": 3, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
    export = {"formats": ["torchscript", "onnx"]}
    job = write_project(tmp_path / "project", extra=SLOW, name=MODEL, train=train, export=export)
    prefect = Api(machine)
    run = prefect.start("train-and-ship", job=str(job))
    folder = machine.runs / MODEL / run

    def complete(stage: str) -> bool:
        return (folder / stage / MANIFEST).exists()

    def state() -> str:
        return str(prefect.ask("GET", f"/flow_runs/{run}")["state_type"])

    # The worker, with the flow that it runs, in the middle of training.
    eventually(lambda: len(list(folder.glob("checkpoints/step-????????"))) >= 2, "two checkpoints", 120)
    lose(machine, "worker")
    ship("up")
    assert state() == "CRASHED"
    retry(run)

    # Both servers, under a flow that is at work and goes on meanwhile.
    eventually(lambda: complete("train"), "trained", 120)
    for server in ("prefect", "mlflow"):
        lose(machine, server)
    ship("up")

    # Everything at once, when the files are in the registry.
    eventually(lambda: complete("release"), "registered", 180)
    kill(list(processes_of(machine)))
    written = {stage: (folder / stage / MANIFEST).stat().st_mtime_ns for stage in STAGES if complete(stage)}
    ship("up")
    if state() != "COMPLETED":
        assert state() == "CRASHED"
        retry(run)
        eventually(lambda: state() in ("COMPLETED", "FAILED", "CRASHED"), "an end", 180)
    assert state() == "COMPLETED", (machine.home / "logs" / "worker.log").read_text()[-4000:]

    again = {stage: (folder / stage / MANIFEST).stat().st_mtime_ns for stage in written}
    assert {**again, "rehearse": 0} == {**written, "rehearse": 0} and {"train", "export", "validate"} <= set(written)
    assert "resumed from step" in (folder / "train" / "events.jsonl").read_text()
    live = read_pointer(Channel(ObjectStore.from_settings(machine), MODEL, "prod"))
    assert live is not None and live.generation == 1
    versions = connect(machine.mlflow_url).search_model_versions(f"name='{MODEL}'")
    assert [version.version for version in versions] == ["1"]
    ship("doctor")


MOMENTS = {"train": Left.NOTHING, "export": Left.NAMES, "validate": Left.HALF, "release": Left.NOTHING}
"""The power goes off when a stage has just got its name, and so much of what was not synced is there."""


# `unit/test_power_cut.py` has every operation on a folder of two small stages.
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_goes_on_from_what_a_power_cut_leaves_of_its_folder(stack: Settings, tmp_path: Path) -> None:
    train = {"epochs": 3, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
    export = {"formats": ["torchscript", "onnx"]}
    job = write_project(tmp_path, name="torn", train=train, export=export)
    runs = stack.runs.resolve() / "torn"
    runs.mkdir(parents=True)
    operations = recorded([str(Path(sys.executable).with_name("ship")), "run", str(job)], runs)
    for stage, left in MOMENTS.items():
        named = [at for at, done in enumerate(operations) if done.what == "rename" and done.other.endswith(f"/{stage}")]
        state = next(state for state in states(operations, {named[0] + 1}) if state.left == left)
        shutil.rmtree(runs)
        state.put(runs)
        (folder,) = runs.glob("*-*")
        ship("run", str(job), "--resume", folder.name)
        assert all((folder / name / MANIFEST).exists() for name in STAGES), state
        assert not list(folder.glob("*.damaged")), state
    ship("doctor", "torn")

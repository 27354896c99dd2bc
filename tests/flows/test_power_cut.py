"""The worker, the servers and at last the whole machine die under a run; it goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.objectstore import ObjectStore
from infra.processes import PidFile
from infra.rundir import MANIFEST
from infra.settings import Settings
from registry.mlflow_client import connect
from registry.pointer import read_pointer
from tests.conftest import free_ports, stack_environment
from tests.flows.test_killed_everywhere import STAGES
from tests.flows.test_resume import SLOW
from tests.projects import REPOSITORY, write_project

MODEL = "powerless"
DEPLOYMENT = "train-and-ship/train-and-ship"


class Machine:
    """A stack of its own, which can lose power."""

    def __init__(self) -> None:
        self.settings = Settings.load()
        self.home = self.settings.home

    def run(self, *argv: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name(argv[0]), *argv[1:]],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def api(self, method: str, path: str, body: object = None) -> Any:
        reply = httpx.request(method, self.settings.prefect_api_url + path, json=body, trust_env=False)
        return reply.raise_for_status().json()

    def state(self, flow_run: str) -> str:
        return str(self.api("GET", f"/flow_runs/{flow_run}")["state"]["type"])

    def processes(self) -> list[psutil.Process]:
        """Everything of this machine that is alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SHIP_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, component: str) -> None:
        """SIGKILL for one server or the worker, and for what it has started."""
        record = PidFile.read(self.home / "pids" / f"{component}.json")
        process = record.process() if record is not None else None
        assert process is not None, f"{component} is not running"
        for one in [process, *process.children(recursive=True)]:
            one.send_signal(signal.SIGKILL)

    def lose_power(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        eventually(lambda: not self.processes(), 30)


def eventually(look: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    for name, value in stack_environment(tmp_path / "home", free_ports(3)).items():
        monkeypatch.setenv(name, value)
    # A listener of the local S3 server that has a port of its own.
    monkeypatch.setenv("IOT_MTLS_PORT", str(free_ports(1)[0]))
    machine = Machine()
    try:
        machine.run("ship", "up")
        yield machine
    finally:
        machine.run("ship", "down")


@pytest.mark.timeout(600)
def test_a_run_outlives_its_worker_its_servers_and_the_machine(machine: Machine, tmp_path: Path) -> None:
    train = {"epochs": 3, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
    export = {"formats": ["torchscript", "onnx"]}
    job = write_project(tmp_path / "project", extra=SLOW, name=MODEL, train=train, export=export)
    deployment = machine.api("GET", f"/deployments/name/{DEPLOYMENT}")["id"]
    body = {"parameters": {"job": str(job)}, "state": {"type": "SCHEDULED"}}
    run = str(machine.api("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])
    folder = machine.settings.runs / MODEL / run

    def complete(stage: str) -> bool:
        return (folder / stage / MANIFEST).exists()

    # The worker, with the flow that it runs, in the middle of training.
    eventually(lambda: len(list(folder.glob("checkpoints/step-????????"))) >= 2, 120)
    machine.kill("worker")
    machine.run("ship", "up")
    assert machine.state(run) == "CRASHED"
    machine.run("prefect", "flow-run", "retry", run)

    # Both servers, under a flow that is at work and goes on meanwhile.
    eventually(lambda: complete("train"), 120)
    for server in ("prefect", "mlflow"):
        machine.kill(server)
    machine.run("ship", "up")

    # Everything at once, when the files are in the registry.
    eventually(lambda: complete("release"), 180)
    machine.lose_power()
    written = {stage: (folder / stage / MANIFEST).stat().st_mtime_ns for stage in STAGES if complete(stage)}
    machine.run("ship", "up")
    if machine.state(run) != "COMPLETED":
        assert machine.state(run) == "CRASHED"
        machine.run("prefect", "flow-run", "retry", run)
        eventually(lambda: machine.state(run) in ("COMPLETED", "FAILED", "CRASHED"), 180)
    assert machine.state(run) == "COMPLETED", (machine.home / "logs" / "worker.log").read_text()[-4000:]

    again = {stage: (folder / stage / MANIFEST).stat().st_mtime_ns for stage in written}
    assert {**again, "rehearse": 0} == {**written, "rehearse": 0} and {"train", "export", "validate"} <= set(written)
    assert "resumed from step" in (folder / "train" / "events.jsonl").read_text()
    live = read_pointer(ObjectStore.from_settings(machine.settings), MODEL, "prod")
    assert live is not None and live.generation == 1
    versions = connect(machine.settings.mlflow_url).search_model_versions(f"name='{MODEL}'")
    assert [version.version for version in versions] == ["1"]
    assert machine.run("ship", "doctor").strip()

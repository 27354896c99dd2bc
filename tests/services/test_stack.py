"""The local stack against the real servers. One stack serves the tests that leave it running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.local_stack import stack_environment
from tests.support.passwords import VARIABLES
from tests.support.ports import free_ports
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings

# The last one stops what they share.
pytestmark = pytest.mark.in_order
ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
PORTS = ("SHIP_PREFECT_PORT", "SHIP_MLFLOW_PORT", "SHIP_S3_PORT")

FLOW = """
import subprocess, sys, time
from prefect import flow

@flow(name="tiny")
def tiny(seconds: int = 0):
    if seconds:
        # As a launcher does: the child has a session of its own.
        subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], start_new_session=True)
"""
PREFECT_YAML = """
name: train-and-ship
deployments:
- {name: tiny, entrypoint: "tiny.py:tiny", work_pool: {name: local}}
"""


@dataclass(frozen=True)
class Stack:
    """A project folder of its own and the `ship` command in it."""

    project: Path
    environment: dict[str, str]

    def run(self, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command that is installed beside the interpreter."""
        return subprocess.run(
            [SCRIPTS / argv[0], *argv[1:]],
            cwd=self.project,
            env={**self.environment, **extra},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def ship(self, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return self.run("ship", *argv, **extra)

    @property
    def settings(self) -> Settings:
        return Settings.model_validate({**self.environment, "SHIP_HOME": self.home})

    @property
    def home(self) -> Path:
        return self.project / ".ship"

    def pids(self) -> dict[str, int]:
        return {file.stem: json.loads(file.read_text())["pid"] for file in (self.home / "pids").glob("*.json")}

    def processes(self) -> list[psutil.Process]:
        """Everything alive that names this stack's home in its command line or environment."""
        found = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
                if process.status() != psutil.STATUS_ZOMBIE and any(str(self.home) in word for word in words):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def api(self, method: str, path: str, body: object = None) -> Any:
        # A busy server may say that its database is locked: no answer to what was asked.
        return Api(self.settings).ask(method, path, body)

    def runs(self) -> dict[str, str]:
        """State types of all flow runs by id."""
        return {run["id"]: run["state_type"] for run in self.api("POST", "/flow_runs/filter", {})}

    def start_long_run(self) -> str:
        """Start a run of five minutes, wait until its child process is there, and return its id."""
        deployment = self.api("GET", "/deployments/name/tiny/tiny")["id"]
        body = {"parameters": {"seconds": 300}, "state": {"type": "SCHEDULED"}}
        run = self.api("POST", f"/deployments/{deployment}/create_flow_run", body)["id"]
        assert eventually(lambda: bool(self.sleepers())), self.runs()
        return str(run)

    def sleepers(self) -> list[psutil.Process]:
        """The grandchild of a long run."""
        return [process for process in self.processes() if "time.sleep(300)" in " ".join(process.cmdline())]


def make_stack(folder: Path) -> Stack:
    folder.mkdir()
    # A project with a stack of its own.
    (folder / ".ship").mkdir(mode=0o700)
    shutil.copy(ROOT / "prefect.toml", folder)
    (folder / "tiny.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text(PREFECT_YAML)
    ours = stack_environment(folder / ".ship")
    # Only the ports: home, addresses and the password have to be found without help.
    environment = {name: value for name, value in os.environ.items() if name not in {**ours, **VARIABLES}}
    environment.update({name: value for name, value in ours.items() if name in PORTS})
    # MiniStack's MQTT listener ignores BIND_HOST. On its fixed default port, another MiniStack would hide that.
    environment["IOT_MTLS_PORT"] = str(free_ports(1)[0])
    return Stack(folder, environment)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = make_stack(tmp_path_factory.mktemp("stack") / "project")
    try:
        done = stack.ship("up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield stack
    finally:
        stack.ship("down")


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Stack]:
    """A project whose stack was not started."""
    stack = make_stack(tmp_path / "project")
    yield stack
    stack.ship("down")


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_status_of_a_running_stack_shows_four_components_up(running: Stack) -> None:
    done = running.ship("status", COLUMNS="160")
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if " up " in line]
    assert len(rows) == 4
    assert all(str(pid) in done.stdout for pid in running.pids().values())


def test_every_listening_socket_of_the_stack_is_on_loopback(running: Stack) -> None:
    sockets = [
        connection
        for process in running.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}
    # The worker adds a port of its own choice.
    ours = {int(running.environment[name]) for name in PORTS}
    assert ours <= {connection.laddr.port for connection in sockets}


def test_the_bucket_is_there_after_up(running: Stack) -> None:
    ObjectStore.from_settings(running.settings).check()


def test_a_second_up_starts_nothing(running: Stack) -> None:
    before = running.pids()
    done = running.ship("up")
    assert done.returncode == 0
    assert running.pids() == before
    assert done.stdout.count("already up") == 4
    assert "tiny (unchanged)" in done.stdout


def test_a_second_stack_on_the_same_ports_is_offered_the_first(running: Stack, tmp_path: Path) -> None:
    second = replace(running, project=tmp_path)
    second.home.mkdir()
    done = second.ship("up")
    assert done.returncode == 2
    for part in (f"by your stack in {running.home}", f"share it: export SHIP_HOME={running.home}", "SHIP_S3_PORT="):
        assert part in done.stderr
    assert second.pids() == {}


def test_a_stack_whose_environment_was_deleted_starts_again_in_this_one(running: Stack) -> None:
    file = running.home / "pids" / "s3.json"
    record = json.loads(file.read_text())
    gone = {**record["configuration"], "installation": "/nowhere/.venv"}
    file.write_text(json.dumps({**record, "configuration": gone}))
    done = running.ship("up")
    assert done.returncode == 0, done.stderr
    assert "S3: ran in /nowhere/.venv, which is gone" in done.stdout
    assert running.pids()["s3"] != record["pid"]


def test_two_ups_at_once_end_with_one_stack(running: Stack) -> None:
    os.kill(running.pids()["s3"], signal.SIGKILL)
    both = [
        subprocess.Popen([SCRIPTS / "ship", "up"], cwd=running.project, env=running.environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(output.count("S3: up at") for output in outputs) == 1


def test_components_killed_with_sigkill_come_back_and_leave_no_orphan(running: Stack) -> None:
    before = running.pids()
    # MLflow's server is a child of the process we know; it survives its parent and holds the port.
    for name in ("mlflow", "worker"):
        os.kill(before[name], signal.SIGKILL)
    assert running.ship("status").returncode == 1
    done = running.ship("up")
    assert done.returncode == 0, done.stderr
    after = running.pids()
    assert after["mlflow"] != before["mlflow"] and after["worker"] != before["worker"]
    assert after["s3"] == before["s3"] and after["prefect"] == before["prefect"]
    sessions = {os.getsid(process.pid) for process in running.processes()}
    assert sessions == set(after.values())


def test_prefect_runs_a_deployment_by_bare_or_full_name(running: Stack) -> None:
    runs = []
    for name in ("tiny", "tiny/tiny"):
        done = running.run("prefect", "deployment", "run", name)
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(done.stdout.split("UUID: ")[1].split()[0])
    assert eventually(lambda: all(running.runs()[run] == "COMPLETED" for run in runs)), running.runs()


def test_an_unknown_bare_name_is_still_refused(running: Stack) -> None:
    done = running.run("prefect", "deployment", "run", "nothing")
    assert done.returncode == 1
    assert "'nothing' not found" in done.stdout + done.stderr


def test_changed_settings_of_a_running_stack_are_refused(running: Stack) -> None:
    done = running.ship("up", MLFLOW_TRACKING_URI="http://mlflow.example:5000")
    assert done.returncode == 2
    assert "mlflow of this stack is running" in done.stderr and "ship down" in done.stderr


def test_a_reused_pid_is_never_mistaken_for_ours(running: Stack) -> None:
    file = running.home / "pids" / "s3.json"
    mine = file.read_text()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            file.write_text(json.dumps({**json.loads(mine), "pid": bystander.pid, "token": "x"}))
            running.ship("status")
            # S3 itself still holds its port, and is not provably ours any more.
            refused = running.ship("up")
            assert bystander.poll() is None
            assert refused.returncode == 2 and "SHIP_S3_PORT" in refused.stderr
        finally:
            bystander.kill()
            file.write_text(mine)


def test_cancelling_a_run_ends_its_processes(running: Stack) -> None:
    run = running.start_long_run()
    done = running.run("prefect", "flow-run", "cancel", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert eventually(lambda: running.runs()[run] == "CANCELLED"), running.runs()[run]
    assert eventually(lambda: not running.sleepers())


def test_down_ends_running_flow_runs_and_leaves_no_process(running: Stack) -> None:
    """Last of those that share the stack: it stops it, and looks at what the next start makes of the lost run."""
    run = running.start_long_run()
    done = running.ship("down")
    assert done.returncode == 0, done.stderr
    assert running.processes() == []
    assert running.pids() == {}
    assert running.ship("down").returncode == 0
    status = running.ship("status")
    assert status.returncode == 1 and status.stdout.count(" down ") == 4
    assert running.ship("up").returncode == 0
    assert running.runs()[run] == "CRASHED"


def test_a_taken_port_is_named_before_anything_starts(idle: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(idle.environment["SHIP_MLFLOW_PORT"])))
        taken.listen()
        done = idle.ship("up")
        assert "port taken" in idle.ship("status", COLUMNS="160").stdout
    assert done.returncode == 2
    for part in (idle.environment["SHIP_MLFLOW_PORT"], "export SHIP_MLFLOW_PORT=", f"pid {os.getpid()}"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert idle.processes() == [] and idle.pids() == {}


def test_the_same_port_twice_is_refused(idle: Stack) -> None:
    done = idle.ship("up", SHIP_S3_PORT="14999", SHIP_MLFLOW_PORT="14999")
    assert done.returncode == 2
    assert "SHIP_S3_PORT and SHIP_MLFLOW_PORT are both 14999" in done.stderr


def test_external_services_are_not_started(idle: Stack) -> None:
    external = {"PREFECT_API_URL": "http://prefect.example/api", "MLFLOW_TRACKING_URI": "http://mlflow.example"}
    done = idle.ship("up", **external)
    assert done.returncode == 0, done.stderr
    assert "Prefect (and with it the worker and the deployments): external" in done.stdout
    assert set(idle.pids()) == {"s3"}
    status = idle.ship("status", COLUMNS="160", **external)
    assert status.returncode == 0
    assert status.stdout.count("external") >= 3


def test_a_component_that_dies_while_starting_shows_its_log_and_the_rest_is_stopped(idle: Stack) -> None:
    database = idle.home / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_text("long enough to be looked at, and not a database")
    done = idle.ship("up", MLFLOW_TRACKING_URI="http://mlflow.example")
    assert done.returncode == 1
    assert "Prefect ended while it was starting" in done.stderr
    assert str(idle.home / "logs" / "prefect.log") in done.stderr
    assert "file is not a database" in done.stderr
    assert "Traceback" not in done.stdout
    assert idle.processes() == []

"""What Prefect does by itself, and whom it tells: against a real server and a receiver on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE, eventually
from tests.support.projects import REPOSITORY, SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import LOOPBACK, Settings
from train_and_ship.tasks.automations import UNWATCHED, apply, main

SHORT = {"epochs": 1, "processes": 1, "batch_size": 32}
SILENT_SECONDS = 35


class Receiver:
    """Somebody who wants to be told, as a webhook."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.messages.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Not in the output of the tests."""

        self.server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.address = f"json://{LOOPBACK}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for(self, words: str, seconds: float) -> dict[str, Any]:
        """The first message with these words in its title."""
        deadline = time.monotonic() + seconds
        while True:
            for message in list(self.messages):
                if words in message["title"]:
                    return message
            assert time.monotonic() < deadline, [message["title"] for message in self.messages]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def receiver(stack: Settings) -> Iterator[Receiver]:
    """Told of everything; nobody is told afterwards."""
    receiver = Receiver()
    automated(SHIP_NOTIFY=receiver.address, SHIP_SILENT_SECONDS=str(SILENT_SECONDS))
    yield receiver
    assert automated() == ["train-and-ship: a run fell silent"]
    receiver.server.shutdown()


def automated(**variables: str) -> list[str]:
    """What `ship up` starts as a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return apply(Settings.load())


def state_of(stack: Settings, flow_run: str) -> dict[str, Any]:
    state: dict[str, Any] = Api(stack).ask("GET", f"/flow_runs/{flow_run}")["state"]
    return state


def test_people_are_told_what_went_live_and_what_it_replaced(
    receiver: Receiver, ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    job = write_project(tmp_path, name="told", train=SHORT, export={"formats": ["torchscript"]})
    done = ship("run", str(job))
    assert done.status == 0, done.text
    told = receiver.wait_for("told release", PATIENCE)
    promoted = live(store, "told")
    assert promoted is not None and promoted[1] in told["title"] and "is live on prod" in told["title"]
    assert "The first release" in told["message"] and "/runs/flow-run/" in told["message"]
    # What somebody moves by hand, without Prefect, is told too.
    moved = ship("promote", "told", "--from", "prod", "--to", "staging", "--why", "a look at it")
    assert moved.status == 0 and "warning" not in moved.errors, moved.text
    told = receiver.wait_for("told staging", PATIENCE)
    assert promoted[1] in told["title"] and told["message"].endswith("a look at it")


def test_people_are_told_why_a_candidate_was_refused(receiver: Receiver, ship: Ship, tmp_path: Path) -> None:
    job = write_project(
        tmp_path, name="poor", train=SHORT, export={"formats": ["torchscript"]}, gates={"accuracy": {"min": 0.999}}
    )
    done = ship("run", str(job))
    assert done.status != 0
    told = receiver.wait_for(f"train-and-ship {job}: Refused", PATIENCE)
    assert "accuracy" in told["message"] and "0.999" in told["message"] and "/runs/flow-run/" in told["message"]


def test_people_are_told_of_a_watch_that_fails_each_minute_once_in_ten_and_not_each_time(
    receiver: Receiver, stack: Settings
) -> None:
    api = Api(stack)
    flow = api.ask("POST", "/flows/", {"name": "watch"})["id"]
    for number in range(UNWATCHED + 1):
        assert not [message for message in receiver.messages if message["title"].startswith("watch")] or number > 9
        run = api.ask("POST", "/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
        failed = {"type": "FAILED", "message": "the bucket does not answer"}
        api.ask("POST", f"/flow_runs/{run}/set_state", {"state": failed, "force": True})
    told = receiver.wait_for("watch: 10 runs failed, and rollouts stay as they are", PATIENCE)
    assert "the bucket does not answer" in told["message"]
    assert len([message for message in receiver.messages if "watch" in message["title"]]) == 1


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_run_that_fell_silent_is_crashed_and_told(receiver: Receiver, stack: Settings, tmp_path: Path) -> None:
    train = {**SHORT, "epochs": 40}
    job = write_project(tmp_path, extra=SLOW, name="silent", train=train, export={"formats": ["torchscript"]})
    flow = subprocess.Popen(
        [Path(sys.executable).with_name("ship"), "run", str(job)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    eventually(lambda: list((stack.runs / "silent").glob("*-*")), "the run")
    (run,) = (stack.runs / "silent").glob("*-*")
    heard = {
        "filter": {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run.name}"]},
            "occurred": {"since": "2020-01-01T00:00:00Z"},
        }
    }
    api = Api(stack)
    eventually(lambda: api.ask("POST", "/events/filter", heard)["total"], "a heartbeat")
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    assert state_of(stack, run.name)["type"] == "RUNNING"

    eventually(
        lambda: state_of(stack, run.name)["type"] == "CRASHED", "it is marked as crashed", SILENT_SECONDS + PATIENCE
    )
    told = receiver.wait_for(f"train-and-ship {job}: Crashed", PATIENCE)
    assert f"No sign of life for {SILENT_SECONDS} s" in told["message"]


def test_an_automation_that_was_paused_by_hand_stays_paused(receiver: Receiver, stack: Settings) -> None:
    api = Api(stack)

    def known() -> dict[str, dict[str, Any]]:
        return {item["name"]: item for item in api.ask("POST", "/automations/filter", {})}

    name = "train-and-ship: a release went live"
    api.ask("PATCH", f"/automations/{known()[name]['id']}", {"enabled": False})
    before = known()
    automated(SHIP_NOTIFY=receiver.address, SHIP_SILENT_SECONDS=str(SILENT_SECONDS))
    assert known()[name]["enabled"] is False
    assert {title: item["id"] for title, item in known().items()} == {
        title: item["id"] for title, item in before.items()
    }


@pytest.mark.parametrize("address", ["carrier-pigeon://hunter2@home", "somewhere"])
def test_an_address_that_nobody_can_write_to_is_refused_without_showing_it(
    address: str, stack: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHIP_NOTIFY", address)
    assert main() == 2
    said = capsys.readouterr()
    assert "SHIP_NOTIFY: expected addresses for Apprise" in said.err and "hunter2" not in said.out + said.err

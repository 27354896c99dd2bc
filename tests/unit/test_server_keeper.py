"""`ship serve` and the process behind it: one that is gone is started again, or the command ends and says why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shipreader.errors import ReaderError, RefusedError
from shipreader.inference_limits import Limits
from shipreader.records import FileEntry, Manifest, Release
from shipreader.rollouts import Candidate
from tests.support.onnx_releases import SIGNATURE
from tests.support.processes import PATIENCE
from train_and_ship.infra.errors import ServiceError
from train_and_ship.ship import server as keeping
from train_and_ship.ship import server_process
from train_and_ship.ship.server import Server

RELEASE = Release(
    "prod", 7, Path("/srv"),
    Manifest("digits", "a" * 20, {"model.onnx": FileEntry("0" * 64, 1)}, {"onnx": "model.onnx"}, SIGNATURE, {}, b""),
    "",
)  # fmt: skip
DEADLY = replace(RELEASE, generation=13)
# Speaks as shipreader/inference_server.py does, and does once what the file `mode` says.
PROCESS = """
import json, os, sys, time
from pathlib import Path
mode = Path("mode")
with open("starts", "a") as file:
    file.write("x")
for line in sys.stdin:
    said = json.loads(line)
    wanted = mode.read_text() if mode.exists() else ""
    if "fresh" in said:
        Path("fresh").write_text(str(said["fresh"]))
        Path("tried").write_text(str(said["tried"]))
        if wanted == "hangs":
            mode.unlink()
            time.sleep(600)
        if wanted == "computes":
            mode.unlink()
        canary = "it raises" if wanted == "raises" else ""
        print(json.dumps({"computing": 1000.0 * (wanted == "computes"), "canary": canary}), flush=True)
    elif "candidate" in said:
        if wanted == "dies of it":
            os._exit(4)
        Path("candidate").write_text(json.dumps(said["candidate"]))
        print(json.dumps({"candidate": True}), flush=True)
    else:
        if said["generation"] == 13 or wanted == "dies":
            os._exit(3)
        Path("pid").write_text(str(os.getpid()))
        print(json.dumps({"loaded": said["generation"], "threads": "1 thread"}), flush=True)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(server_process, "_START", PROCESS)
    monkeypatch.setattr(server_process, "STOP_SECONDS", 5)
    monkeypatch.setattr(keeping, "environment", lambda *_: Path(sys.executable))
    for name, seconds in (
        ("LOOK_SECONDS", 0.02), ("HEALTH_SECONDS", 0.02), ("ANSWER_SECONDS", 2.0), ("FIRST_PAUSE_SECONDS", 0.02),
    ):  # fmt: skip
        monkeypatch.setattr(keeping, name, seconds)
    found = Server(folder=tmp_path / "server", model="digits", port=8080, limits=Limits(compute_seconds=100))
    with contextlib.closing(found):
        yield found


@pytest.fixture
def notes(server: Server) -> list[str]:
    """What the keeper says, after the first release was loaded."""
    found: list[str] = []
    server.load(RELEASE)
    server.keep(found.append, lambda: True)
    return found


def until(is_so: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def starts(server: Server) -> int:
    return len((server.folder / "starts").read_text())


def mode(server: Server, what: str) -> None:
    (server.folder / "mode").write_text(what)


def test_a_process_that_was_killed_is_started_again_with_what_it_served(server: Server, notes: list[str]) -> None:
    os.kill(int((server.folder / "pid").read_text()), signal.SIGKILL)
    until(lambda: notes[-1:] == [""])
    assert notes == [
        "the server is gone (it was ended by SIGKILL, as the kernel does when memory is short) and is started again", ""
    ]  # fmt: skip
    assert starts(server) == 2 and server.log.with_name("server.log.1").exists()
    server.require_alive()


@pytest.mark.parametrize(
    ("what", "why"), [("hangs", "it did not answer within 2 s"), ("computes", "it computes one batch for 1000 s")]
)
def test_a_process_that_hangs_is_ended_and_started_again(server: Server, notes: list[str], what: str, why: str) -> None:
    mode(server, what)
    until(lambda: notes[-1:] == [""])
    assert why in notes[0] and starts(server) == 2


def test_a_process_that_cannot_be_brought_back_ends_the_command_with_one_line(server: Server, notes: list[str]) -> None:
    mode(server, "dies")
    os.kill(int((server.folder / "pid").read_text()), signal.SIGTERM)
    until(lambda: server._failure)
    with pytest.raises(
        ServiceError, match="it was ended by SIGTERM, and could not be started again in 5 tries"
    ) as ended:
        server.require_alive()
    assert "\n" not in str(ended.value) and "it ended with 3; its log is" in str(ended.value)
    assert starts(server) == 6 and len(notes) == 1, "it was not said to serve again"
    with pytest.raises(ServiceError):
        server.load(replace(RELEASE, generation=8))


def test_a_process_that_is_gone_again_and_again_ends_the_command(
    server: Server, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MOST_LOSSES", 2)
    for lost in range(1, 4):
        os.kill(int((server.folder / "pid").read_text()), signal.SIGKILL)
        until(lambda lost=lost: len(notes) == 2 * lost or server._failure)
    with pytest.raises(
        ServiceError, match="it was gone 3 times within 10 minutes, now because it was ended by SIGKILL"
    ):
        server.require_alive()


def test_a_release_that_ends_the_process_is_refused_and_not_tried_for_ever(server: Server, notes: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"did not load it .it ended with 3"):
            server.load(DEADLY)
        until(lambda: notes[-1:] == [""])
        notes.clear()
    before = starts(server)
    with pytest.raises(RefusedError, match="ended when it was to load it, and is not asked again"):
        server.load(DEADLY)
    assert starts(server) == before
    server.load(replace(RELEASE, generation=14))
    server.require_alive()


def test_a_first_release_that_ends_the_process_is_a_fault_of_the_start(server: Server) -> None:
    with pytest.raises(ServiceError, match="it ended with 3; last lines of"):
        server.load(DEADLY)
    with pytest.raises(ServiceError):
        server.require_alive()
    # What was kept from before is served all the same.
    server.load(RELEASE)
    server.require_alive()


def tried(**changes: object) -> Candidate:
    release = replace(RELEASE, manifest=replace(RELEASE.manifest, release="b" * 20), rollout="r")
    return replace(Candidate(release, 500, "user_id", 250, False, "r", 1), **changes)  # type: ignore[arg-type]


def test_the_process_hears_what_a_rollout_tries_and_says_what_is_wrong_with_it(server: Server) -> None:
    server.load(RELEASE)
    said: list[str] = []
    running = [True]
    server.keep(lambda _: None, lambda: True, said.append, lambda: running[0])
    server.try_candidate(tried())
    document = json.loads((server.folder / "candidate").read_text())
    assert document.pop("model") == {
        "model": "digits", "generation": 7, "version": "7-" + "b" * 20, "artifact": "/srv/model.onnx",
        "signature": SIGNATURE, "batch_size": 64, "release": "b" * 20, "observe": None,
    }  # fmt: skip
    assert document == {
        "share": 500, "key": "user_id", "fallback_ms": 250, "shadow": False, "rollout": "r", "number": 1
    }  # fmt: skip
    mode(server, "raises")
    until(lambda: said == ["it raises"])
    # Whoever moved the channel has ended it, before the release that follows is here.
    running[0] = False
    until(lambda: (server.folder / "tried").read_text() == "False")
    server.try_candidate(None)
    assert said == ["it raises", ""] and (server.folder / "candidate").read_text() == "null"
    server.require_alive()


def test_a_process_that_ends_with_a_candidate_comes_back_without_it_and_is_not_asked_again(
    server: Server, notes: list[str]
) -> None:
    said: list[str] = []
    server._note_candidate = said.append
    mode(server, "dies of it")
    with pytest.raises(ReaderError, match="the server is gone: it ended with 4"):
        server.try_candidate(tried())
    (server.folder / "mode").unlink()
    until(lambda: notes[-1:] == [""])
    assert said == ["the server ended while it tried the candidate, and is started again without it"]
    with pytest.raises(RefusedError, match="ended while it tried this candidate"):
        server.try_candidate(tried(number=2))
    server.try_candidate(tried(rollout="another"))
    assert (server.folder / "candidate").exists() and starts(server) == 2
    server.require_alive()


def test_the_process_hears_whether_what_it_serves_is_known_to_be_live(server: Server) -> None:
    server.load(RELEASE)
    fresh = [True]
    server.keep(lambda _: None, lambda: fresh[0])
    until(lambda: (server.folder / "fresh").exists() and (server.folder / "fresh").read_text() == "True")
    fresh[0] = False
    until(lambda: (server.folder / "fresh").read_text() == "False")


def test_a_process_that_hangs_does_not_hold_up_the_end_of_the_command(server: Server, notes: list[str]) -> None:
    mode(server, "hangs")
    until(lambda: not (server.folder / "mode").exists())
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < PATIENCE / 2

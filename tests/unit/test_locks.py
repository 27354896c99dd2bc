"""Who waits for another process's lock says so, and does not wait for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from shipreader import local
from shipreader.bucket import Bucket
from shipreader.errors import UnavailableError
from shipreader.local import LocalFolder
from shipreader.reader import Reader
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.locks import locked


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(local, "LOCK_LOOK_SECONDS", 0.01)


def reader(folder: Path) -> Reader:
    return Reader("digits", bucket="models", folder=folder, client=Client(), interval=0.01)


class Client:
    """Asked for nothing but its exceptions."""

    exceptions = None


def test_a_command_waits_for_another_one_says_whose_lock_it_is_and_gives_up(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "stack.lock"
    with (
        locked(path, "changing this stack", 1),
        pytest.raises(ServiceError, match=f"another process .{os.getpid()}. is changing this stack and has not ended"),
        locked(path, "changing this stack", 0.3, lines.append),
    ):
        pytest.fail("it is another's")
    assert len(lines) == 1 and f"({os.getpid()}) is changing this stack; waiting for it for 0.3 s" in lines[0]
    with locked(path, "changing this stack", 0.3):
        pass


def test_a_reader_gives_up_waiting_for_another_one_in_its_folder(tmp_path: Path, impatient: None) -> None:
    second = reader(tmp_path)
    with (
        LocalFolder(tmp_path).locked(),
        pytest.raises(
            UnavailableError, match=rf"another process \({os.getpid()}\) is at work in it, and has not ended"
        ),
    ):
        second.pull()
    assert "another process" in second.status().problem


def test_a_reader_that_follows_says_that_it_waits_and_ends_when_it_is_told_to(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOCK_SECONDS", 600)
    follower = reader(tmp_path)
    # It has begun to follow.
    follower._thread = threading.Thread(target=follower._run, daemon=True)
    with LocalFolder(tmp_path).locked():
        follower._thread.start()
        ends = time.monotonic() + 20
        while "waiting for it" not in follower.status().problem:
            assert time.monotonic() < ends
            time.sleep(0.01)
        began = time.monotonic()
        follower.close()
        assert time.monotonic() - began < 10


def test_a_reader_goes_on_when_the_lock_is_free_again(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOCK_SECONDS", 600)
    monkeypatch.setattr(Bucket, "changed", lambda *_: None)
    second = reader(tmp_path)
    held = LocalFolder(tmp_path).locked()
    held.__enter__()
    threading.Timer(0.2, lambda: held.__exit__(None, None, None)).start()
    with pytest.raises(UnavailableError, match="nothing is live on prod"):
        second.pull()
    assert "another process" not in second.status().problem

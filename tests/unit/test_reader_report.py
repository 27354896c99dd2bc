"""What a following process says of itself: to a command, to Prometheus and to a readiness probe."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from shipreader import report as report_module
from shipreader.__main__ import main
from shipreader.bucket import Bucket
from shipreader.reader import Reader, Status
from shipreader.records import FileEntry, Manifest, Release
from shipreader.report import READERS, Report, answering, metrics, read_reports

RELEASE = Release(
    "prod",
    7,
    Path("/srv/digits/releases/abc"),
    Manifest("digits", "3f2a9c01d4e5b6a7c8d9", {"model.onnx": FileEntry("0" * 64, 1)}, {}, {}, {}, b""),
    "2026-11-29T02:00:00Z",
)


def said(**changes: object) -> Status:
    return replace(Status(RELEASE, time.time() - 30, "", 7), **changes)  # type: ignore[arg-type]


def status_command(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["shipreader", "digits", "--to", str(folder), "--status", *words])
    return main()


def test_readiness_ends_when_nobody_knows_whether_what_is_served_is_live() -> None:
    assert said().ready() and said().ready(max_stale=60) and not said().ready(max_stale=20)
    assert not said(release=None).ready() and not said(checked_at=None).ready(max_stale=20)
    assert said(checked_at=None).stale_seconds() is None


def test_a_clock_that_is_set_back_makes_nothing_fresh() -> None:
    now = said(checked_at=time.time() + 3600, checked_clock=time.monotonic() - 30)
    assert not now.ready(max_stale=20) and now.ready(max_stale=60)


def test_the_command_says_what_the_following_process_sees_and_ends_with_1_when_it_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SHIP_BUCKET", raising=False)
    assert status_command(monkeypatch, tmp_path) == 1
    assert "no process follows digits prod here" in capsys.readouterr().err
    report = Report(tmp_path)
    report.write("digits", "prod", said(problem="on_change failed", seen=8))
    assert status_command(monkeypatch, tmp_path, "--max-stale", "60") == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["generation"], line["seen"], line["problem"], line["ready"]) == (7, 8, "on_change failed", True)
    assert 29 < line["seconds_since_check"] < 40
    assert status_command(monkeypatch, tmp_path, "--max-stale", "5") == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False
    assert status_command(monkeypatch, tmp_path, "--channel", "staging") == 1
    report.close()
    assert status_command(monkeypatch, tmp_path) == 1


def test_a_process_that_died_says_nothing_any_more(tmp_path: Path) -> None:
    living, dead = Report(tmp_path), Report(tmp_path)
    for report in (living, dead):
        report.write("digits", "prod", said())
    assert len(read_reports(tmp_path)) == 2
    assert dead._lock is not None
    dead._lock.close()
    assert len(read_reports(tmp_path)) == 1
    assert len(list((tmp_path / READERS).iterdir())) == 2
    living.close()


def test_a_report_that_cannot_be_written_disturbs_nobody(tmp_path: Path) -> None:
    report = Report(tmp_path / "gone")
    report.write("digits", "prod", said())
    report.close()


def test_prometheus_gets_the_generation_served_and_seen_and_how_old_that_is() -> None:
    lines = metrics("digits", "prod", said(seen=8, problem="x"), max_stale=10).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = 'model="digits",channel="prod"'
    assert values.pop(f"shipreader_seconds_since_check{{{labels}}}").startswith("30")
    assert values == {
        f"shipreader_ready{{{labels}}}": "0",
        f"shipreader_problem{{{labels}}}": "1",
        f"shipreader_rollout_problem{{{labels}}}": "0",
        f'shipreader_generation{{{labels},what="served"}}': "7",
        f'shipreader_generation{{{labels},what="seen"}}': "8",
    }
    assert sum(line.startswith("# TYPE shipreader_generation") for line in lines) == 1


def test_probes_and_prometheus_are_answered_on_this_machine() -> None:
    now = [said()]
    with answering("127.0.0.1", 0, "digits", "prod", lambda: now[0], 60) as port:

        def ask(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        assert ask("/live") == (200, "following\n")
        assert ask("/ready")[0] == 200 and "shipreader_ready" in ask("/metrics")[1]
        now[0] = said(checked_at=time.time() - 100)
        code, text = ask("/ready")
        assert code == 503 and json.loads(text)["release"] == RELEASE.id
        assert ask("/")[0] == 404


def test_an_alert_on_how_old_it_is_fires_also_when_it_was_never_known() -> None:
    shown = metrics("digits", "prod", said(checked_at=None))
    assert 'shipreader_seconds_since_check{model="digits",channel="prod"} +Inf' in shown


def test_who_holds_connections_open_leaves_room_for_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "CONNECTIONS", 2)
    monkeypatch.setattr(report_module, "CONNECTION_SECONDS", 0.2)
    with answering("127.0.0.1", 0, "digits", "prod", said, None) as port:
        open_ones = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2)]
        for one in open_ones:
            one.sendall(b"GET /")
        # Closed at once.
        third = socket.create_connection(("127.0.0.1", port), timeout=10)
        with third, contextlib.suppress(ConnectionError):
            assert third.recv(1) == b""
        for one in open_ones:
            with contextlib.suppress(ConnectionError):
                while one.recv(1000):
                    pass
            one.close()
        ends = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=10) as reply:
                    assert reply.status == 200
                break
            except OSError:
                assert time.monotonic() < ends


def test_who_serves_says_that_it_does_not_and_readiness_ends(tmp_path: Path) -> None:
    reader = Reader("digits", bucket="models", folder=tmp_path, client=Client())
    reader._served, reader._checked = RELEASE, (time.time(), time.monotonic())
    assert reader.status().ready(60)
    reader.note_fault("the server is gone")
    assert not reader.status().ready() and reader.status().problem == "the server is gone"
    assert reader.current is None and "shipreader_ready{" in metrics("digits", "prod", reader.status())
    reader.note_fault("")
    assert reader.status().ready(60) and reader.status().problem == ""


def test_a_caller_that_wants_to_exit_does_not_end_the_thread_without_a_word(tmp_path: Path) -> None:
    def leave(release: Release) -> None:
        sys.exit("no memory")

    reader = Reader("digits", bucket="models", folder=tmp_path, client=Client(), on_change=leave)
    reader._current, reader._thread = RELEASE, threading.current_thread()
    reader._announce()
    assert "on_change failed for release 3f2a9c01d4e5b6a7c8d9: SystemExit: no memory" in reader.status().problem


class Client:
    """Asked for nothing but its exceptions."""

    exceptions = None


def test_a_port_that_is_taken_is_named_before_anything_is_asked_of_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bucket, "changed", lambda *_: pytest.fail("asked"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--bucket", "b", "--follow", "--listen", str(port)]
        monkeypatch.setattr(sys, "argv", ["shipreader", "digits", "--to", str(tmp_path), *words])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert main() == 1
    assert f"expected to listen on port {port} of 127.0.0.1: Address already in use" in capsys.readouterr().err


def test_ipv6_is_listened_on_as_well() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with (
        answering("::1", 0, "digits", "prod", said, None) as port,
        urllib.request.urlopen(f"http://[::1]:{port}/live", timeout=10) as reply,
    ):
        assert reply.status == 200


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--follow"], "--bucket, or SHIP_BUCKET, is missing"),
        (["--bucket", "b", "--listen", "9100"], "expected --follow beside it"),
        (["--bucket", "b", "--follow", "--listen", "x"], "expected [HOST:]PORT, such as 9100, got 'x'"),
        (["--status", "--max-stale", "0"], "expected seconds above 0"),
        (["--bucket", "b", "--follow", "--max-stale", "60"], "expected --status or --listen beside it"),
    ],
)
def test_a_mistake_ends_the_command_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.delenv("SHIP_BUCKET", raising=False)
    monkeypatch.setattr(sys, "argv", ["shipreader", "digits", "--to", "x", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and expected in capsys.readouterr().err

"""The table of all models, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.projects import write_project
from train_and_ship.registry.channels.decisions import SKIPPED, Decision
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.ship.status import ChannelStatus, LastRun, _print_models, newest, soonest

NOW = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)
LIVE = Pointer(
    model="digits", channel="prod", generation=3, release="a" * 20, manifest_sha256="0" * 64, previous=None,
    nonce="n", moved_at=(NOW - timedelta(days=3, hours=5)).isoformat(), moved_by="ada", reason="", flow_run="",
    mlflow_version="1",
)  # fmt: skip


def skipped(why: str) -> Decision:
    return Decision(
        model="digits", channel="prod", decision=SKIPPED, why=why,
        at=(NOW - timedelta(hours=8)).isoformat(), flow_run="r", asked="ada", live="a" * 20,
    )  # fmt: skip


def test_a_row_says_what_is_live_how_old_it_is_and_what_was_decided() -> None:
    last = skipped("nothing has changed")
    row = ChannelStatus(model="digits", channel="prod", live=LIVE, last=last, next=NOW + timedelta(hours=16)).row(NOW)
    assert row[:6] == ("digits", "prod", "a" * 20, "3 d", "8 h ago: skipped", "nothing has changed")
    assert row[6].startswith("2026-11-2")


def test_a_model_of_which_little_is_known_has_dashes() -> None:
    row = ChannelStatus(model="new", channel="prod", live=None, last=None, next=None).row(NOW)
    assert row == ("new", "prod", "nothing", "–", "–", "", "–")


def test_the_next_run_is_the_soonest_of_each_model_and_a_job_file_elsewhere_is_left_out(tmp_path: Path) -> None:
    job = write_project(tmp_path, name="one", release={"channel": "staging"})
    runs = [
        {"parameters": {"job": str(job)}, "tags": ["auto-scheduled"], "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {"job": "/nowhere/job.yaml"}, "tags": [], "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {}, "tags": [], "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {"job": "job.yaml"}, "tags": [], "expected_start_time": "2026-11-26T02:00:00Z"},
    ]
    assert soonest(runs, tmp_path) == {("one", "staging"): datetime(2026, 11, 25, 2, tzinfo=UTC)}


def test_the_next_run_of_a_project_that_was_deployed_is_known_by_its_tags(tmp_path: Path) -> None:
    sent = {"parameters": {"job": f"project:two/{'0' * 64}/job.yaml"}, "expected_start_time": "2026-11-25T02:00:00Z"}
    tags = ["two", "model:two", "channel:prod"]
    assert soonest([{**sent, "tags": tags}], tmp_path) == {("two", "prod"): datetime(2026, 11, 25, 2, tzinfo=UTC)}
    assert soonest([{**sent, "tags": ["model:../x", "channel:prod"]}], tmp_path) == {}


def flow_run(state: str, minutes: int, tags: list[str], message: str | None = None) -> dict[str, Any]:
    at = (NOW - timedelta(minutes=minutes)).isoformat()
    return {
        "id": f"r{minutes}",
        "name": "n",
        "tags": tags,
        "state": {"name": state, "timestamp": at, "message": message},
    }


def test_the_last_run_of_a_channel_is_shown_unless_what_was_decided_is_newer() -> None:
    tags = ["model:digits", "channel:prod"]
    runs = [
        flow_run("Refused", 5, tags, "accuracy 0.9 < 0.97"),
        flow_run("Promoted", 9, tags),
        flow_run("Failed", 9, ["model:../x", "channel:prod"]),
        flow_run("Failed", 9, ["other"]),
    ]
    ran = newest(runs)
    assert ran.keys() == {("digits", "prod")}
    run = ran["digits", "prod"]
    # Its decision of eight hours ago is older.
    shown = ChannelStatus(model="digits", channel="prod", live=LIVE, last=skipped("x"), next=None, run=run)
    assert shown.row(NOW)[4:6] == ("5 min ago: refused", "accuracy 0.9 < 0.97")
    assert shown.as_json()["run"]["state"] == "Refused" and shown.as_json()["decision"]["why"] == "x"
    older = LastRun(id="q", name="n", state="Promoted", at=NOW - timedelta(hours=9), message="")
    elder = ChannelStatus(model="digits", channel="prod", live=LIVE, last=skipped("x"), next=None, run=older)
    assert elder.row(NOW)[4:6] == ("8 h ago: skipped", "x")


def test_a_narrow_terminal_gets_lines_with_names_whole_and_reasons_cut(capsys: pytest.CaptureFixture[str]) -> None:
    last = skipped("nothing has changed " * 9)
    rows = [
        ChannelStatus(model="digits", channel="prod", live=LIVE, last=last, next=NOW),
        ChannelStatus(model="new", channel="prod", live=None, last=None, next=None),
    ]
    _print_models(rows, Console(width=80))
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first.startswith(f"digits prod: {'a' * 20}, live for ") and third.startswith("  next run 2026-11-2")
    assert "skipped: nothing has changed" in second and second.endswith("…") and len(second) == 80
    assert fourth == "new prod: nothing"
    assert rows[0].as_json()["decision"]["decision"] == "skipped" and rows[1].as_json()["release"] is None

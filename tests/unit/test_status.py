"""The table of all models, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.projects import write_project
from train_and_ship.registry.channels.decisions import SKIPPED, Decision
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.ship.status import ChannelStatus, _print_models, soonest

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
        {"parameters": {"job": str(job)}, "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {"job": "/nowhere/job.yaml"}, "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {}, "expected_start_time": "2026-11-25T02:00:00Z"},
        {"parameters": {"job": "job.yaml"}, "expected_start_time": "2026-11-26T02:00:00Z"},
    ]
    assert soonest(runs, tmp_path) == {("one", "staging"): datetime(2026, 11, 25, 2, tzinfo=UTC)}


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

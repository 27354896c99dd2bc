from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchworker.custom_loop import reporting
from torchworker.custom_loop.reporting import ALL_KEPT, Reports
from torchworker.process.events import EventLog
from torchworker.process.failure import UserError
from train_and_ship.registry.report.page import Page, Section, markdown
from train_and_ship.registry.report.training_sections import ROWS, history_tables
from train_and_ship.registry.text import Table
from train_and_ship.registry.tracking.curves import event_points, history_points, latest_of
from train_and_ship.tasks.train import describe_report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"seconds": 0.0}
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now["seconds"])
    return now


def made(folder: Path) -> Reports:
    return Reports("train.entrypoint: mine:main", 0, EventLog(folder / "events.jsonl"), folder / "c" / "reports.jsonl")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_numbers_of_any_kind_become_a_row_and_an_event(tmp_path: Path) -> None:
    said = made(tmp_path)
    said.add({"a": torch.tensor([2.5], requires_grad=True), "b/c d": np.float64(1), "e": True}, 7, 9)

    (row,) = said.finish()
    assert {**row, "time": 0} == {"step": 7, "a": 2.5, "b/c d": 1.0, "e": 1.0, "time": 0}
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], event["steps"]) == ("report", 7, 9)
    assert event["metrics"] == {"a": 2.5, "b/c d": 1.0, "e": 1.0}
    assert describe_report(event) == "step 7/9  a 2.5  b/c d 1  e 1"


def test_a_fast_loop_is_thinned_out_by_time_and_its_last_report_kept(tmp_path: Path, clock: dict[str, float]) -> None:
    said = made(tmp_path)
    for step in range(ALL_KEPT + 5000):
        clock["seconds"] += 0.01
        said.add({"loss": 1.0}, step, None)
        if step % 500 == 0:
            said.add({"accuracy": 0.5}, step, None)
    rows = said.finish()

    assert [row["step"] for row in rows if "accuracy" in row] == list(range(0, 6000, 500))
    loss = [row["step"] for row in rows if "loss" in row]
    assert loss[:ALL_KEPT] == list(range(ALL_KEPT))
    # 50 seconds at 4 a second.
    assert 190 <= len(loss) - ALL_KEPT <= 210
    assert loss[-1] == 5999
    assert len(events(tmp_path)) == len(rows)


def test_a_resumed_run_has_what_was_reported_up_to_its_step(tmp_path: Path) -> None:
    first = made(tmp_path)
    for step in range(5):
        first.add({"loss": float(step)}, step, None)
    with (tmp_path / "c" / "reports.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a SIGKILL leaves it
    second = made(tmp_path)
    second.resume(2)
    second.add({"loss": 30.0}, 3, None)
    third = made(tmp_path)
    third.resume(3)

    assert [(row["step"], row["loss"]) for row in third.finish()] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_run_that_begins_anew_has_nothing_of_what_was_reported_before(tmp_path: Path) -> None:
    made(tmp_path).add({"loss": 1.0}, 1, None)
    again = made(tmp_path)
    again.add({"loss": 2.0}, 1, None)
    third = made(tmp_path)
    third.resume(1)
    assert [row["loss"] for row in third.finish()] == [2.0]


def test_other_ranks_keep_nothing_but_their_numbers_are_checked(tmp_path: Path) -> None:
    said = Reports("mine:main", 3, None, tmp_path / "reports.jsonl")
    said.add({"loss": 1.0}, 0, None)
    assert said.finish() == []
    with pytest.raises(UserError, match=r"reported loss nan at step 1 \(rank 3\)"):
        said.add({"loss": math.nan}, 1, None)
    assert list(tmp_path.iterdir()) == []


def test_reports_are_curves_over_their_step_and_the_same_from_history_and_events() -> None:
    event = {"event": "report", "step": 40, "steps": 90, "metrics": {"loss": 0.5, "epoch": 2.0}, "time": 100.0}
    row = {"step": 40, "loss": 0.5, "epoch": 2.0, "time": 100.0}
    assert event_points({**event, "memory_bytes": 5}) == history_points([row])
    assert [(point.key, point.value, point.step) for point in history_points([row])] == [
        ("loss", 0.5, 40),
        ("epoch", 2.0, 40),
    ]


def test_a_report_shows_each_kind_of_row_and_not_more_than_can_be_read() -> None:
    history = [{"step": step, "loss": 1 / (step + 1), "time": 0.0} for step in range(450)]
    history.insert(100, {"step": 99, "accuracy": 0.5, "time": 0.0})
    section = Section(title="Learning curves", blocks=history_tables(history_points(history), "step"))
    page = markdown(Page(title="", verdict="", good=True, intro="", facts=Table(rows=()), sections=[section]))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert 90 <= len(lines) - 5 <= ROWS
    assert any(line.startswith("| 449") for line in lines) and "90 of 450 rows" in page
    assert any("0.5" in line and line.startswith("| 99") for line in lines)
    assert latest_of(history) == {"step": 449, "loss": 1 / 450, "time": 0.0, "accuracy": 0.5}

"""Event files and logs as processes leave them that died: half a line costs only itself, and size costs no memory."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from torchworker.process.events import EventLog
from torchworker.process.tail import tail
from train_and_ship.infra.fork_server import Follower
from train_and_ship.infra.json_lines import READ_BYTES, append_object, next_objects
from train_and_ship.infra.processes import last_lines
from train_and_ship.registry.cost import LEDGER, read_costs
from train_and_ship.registry.tracking.curves import file_points


def followed(path: Path) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    follower = Follower(path, seen.append)
    follower.poll()
    follower.poll()
    return seen


def test_half_a_line_of_a_killed_rank_ends_no_training_and_hides_no_later_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "started"}\n{"event": "st')
    EventLog(path).write("epoch", epoch=1)
    assert [event["event"] for event in followed(path)] == ["started", "epoch"]


def test_what_is_no_object_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'3\n[]\nnull\n\n{"event"\n\xff\xfe\n{"event": "st{"event": "epoch"}\n{"event": "last"}\n')
    assert followed(path) == [{"event": "last"}]
    assert file_points(path) == []


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path, seen = tmp_path / "events.jsonl", list[Any]()
    follower = Follower(path, seen.append)
    follower.poll()
    path.write_text('{"event": "a"}\n{"event"')
    follower.poll()
    assert seen == [{"event": "a"}]
    with path.open("a") as file:
        file.write(': "b"}\n')
    follower.poll()
    assert seen == [{"event": "a"}, {"event": "b"}]


def test_a_line_without_end_keeps_nobody_from_what_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "' + "x" * 3 * READ_BYTES + '"}\n{"event": "last"}\n')
    assert followed(path) == [{"event": "last"}]


def test_two_writers_of_one_file_lose_no_event(tmp_path: Path) -> None:
    agent, rank = EventLog(tmp_path / "events.jsonl"), EventLog(tmp_path / "events.jsonl")
    for number in range(50):
        (agent if number % 2 else rank).write("step", step=number)
    assert [event["step"] for event in followed(tmp_path / "events.jsonl")] == list(range(50))


def test_a_full_disk_costs_events_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file whose disk has room for half a line, once."""

        def __init__(self, path: Path) -> None:
            self.file, self.full = path.open("ab+", buffering=0), True

        def write(self, line: bytes) -> int:
            if self.full:
                self.full = False
                self.file.write(line[:9])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(line)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    monkeypatch.setattr(log, "_file", Full(path))
    log.write("epoch", epoch=1)
    log.write("epoch", epoch=2)
    assert [event["epoch"] for event in followed(path)] == [2]


def test_the_ledger_of_costs_goes_on_behind_half_a_line(tmp_path: Path) -> None:
    append_object(tmp_path / LEDGER, {"began": "1", "stage": "train"})
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"ended": "1", "st')
    append_object(tmp_path / LEDGER, {"began": "2", "stage": "export"})
    assert {(cost.stage, cost.killed) for cost in read_costs(tmp_path)} == {("train", 1), ("export", 1)}


def test_large_files_cost_bounded_memory(tmp_path: Path) -> None:
    events, log = tmp_path / "events.jsonl", tmp_path / "train.log"
    line = json.dumps({"event": "note", "text": "x" * 2000}) + "\n"
    events.write_text(line * 10_000)
    log.write_text("what a rank prints\n" * 1_000_000 + "the last line\n")
    count = 0

    def see(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1

    tracemalloc.start()
    try:
        Follower(events, see).poll()
        assert last_lines(log).splitlines()[-1] == tail(log).splitlines()[-1] == "the last line"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    # Of 20 MB each.
    assert peak < 6_000_000
    assert last_lines(tmp_path / "none") == "(the log is empty)" and tail(tmp_path / "none") == ""


def test_nothing_whole_is_the_end(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{")
    with (tmp_path / "events.jsonl").open("rb") as file:
        assert next_objects(file) is None and file.tell() == 0

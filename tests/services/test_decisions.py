"""The record of what retraining decided, in a real store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from tests.support.fixture_types import Connect
from tests.support.ports import free_port
from tests.support.projects import write_project
from tests.support.releases import move, published
from train_and_ship.flows.retrain import retrain
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import LOOPBACK, Settings
from train_and_ship.registry.bucket.keys import decisions_prefix, histories_prefix, pointer_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import (
    FAILED,
    KEPT,
    PROMOTED,
    SKIPPED,
    WAITING,
    Decision,
    decided_at,
    keep_until_recorded,
    read_decisions,
    record_decision,
    record_waiting,
)
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.status import channel_statuses
from train_and_ship.tasks.decide import streak
from train_and_ship.tasks.outcome import record_failure
from train_and_ship.tasks.results import JobFile, RetrainPlan

FIRST = datetime(2025, 11, 17, 2, 0, tzinfo=UTC)


def decided(number: int, decision: str, model: str = "asked") -> Decision:
    return Decision(
        model=model, channel="prod", decision=decision, why="because", flow_run=f"r{number}", asked="ada",
        at=(FIRST + timedelta(days=number)).isoformat(timespec="milliseconds"), live="a" * 20,
        changed={"code": "fingerprint a → b"}, seconds=1.5,
    )  # fmt: skip


def test_decisions_are_read_back_in_their_order_the_last_ones_first_wanted(object_store: ObjectStore) -> None:
    decisions = [decided(number, decision) for number, decision in enumerate([PROMOTED, SKIPPED, KEPT, SKIPPED])]
    for decision in reversed(decisions):
        record_decision(object_store, decision)
    assert read_decisions(Channel(object_store, "asked", "prod"), 10) == decisions
    assert read_decisions(Channel(object_store, "asked", "prod"), 2) == decisions[-2:]
    assert read_decisions(Channel(object_store, "asked", "staging"), 2) == []


def test_a_decision_can_be_recorded_again_and_never_replaced(object_store: ObjectStore) -> None:
    one = decided(0, KEPT, "once")
    record_decision(object_store, one)
    record_decision(object_store, one)
    with pytest.raises(ReleaseError, match="never replaced"):
        record_decision(object_store, dataclasses.replace(one, why="another reason"))


def test_what_is_no_decision_is_passed_over_and_told_by_its_key(
    object_store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel(object_store, "strange", "prod")
    key = f"{decisions_prefix('strange', 'prod')}20261117T020000.000000Z-r.json"
    object_store.put_new(key, b'{"format": 1, "model": 3}')
    assert read_decisions(channel, 5) == []
    assert f"{key}: expected the record of a decision" in caplog.text
    # Behind it the last one that can be read is the last one.
    ours = decided(0, SKIPPED, "strange")
    record_decision(object_store, ours)
    assert decided_at(ours) < datetime(2026, 11, 17, tzinfo=UTC) and read_decisions(channel, 1) == [ours]


def test_a_channel_whose_records_cannot_be_read_hides_no_other(object_store: ObjectStore) -> None:
    record_decision(object_store, decided(0, KEPT, "readable"))
    # It was moved once: channels are listed by that.
    object_store.put_new(histories_prefix("readable") + "prod/1.json", b"{}")
    object_store.put_new(pointer_key("torn", "prod"), b'{"format": 1')
    table = {row.model: row for row in channel_statuses(object_store, {})}
    assert table["readable"].last is not None and table["readable"].unreadable == ""
    cells = table["torn"].row(FIRST)
    assert cells[2] == "unreadable" and "expected the record of a move" in cells[5]


def test_what_the_bucket_could_not_take_is_recorded_by_the_next_run_with_what_was_live_then(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    moved = move(object_store, manifest)
    later = (datetime.now(UTC) + timedelta(seconds=1)).isoformat(timespec="milliseconds")
    failed = dataclasses.replace(decided(0, FAILED, manifest.model), at=later, live="")
    runs = tmp_path / "runs"
    keep_until_recorded(runs / "r0", failed)
    assert record_waiting(object_store, runs) == 1
    (found,) = read_decisions(Channel(object_store, manifest.model, "prod"), 5)
    assert found == dataclasses.replace(failed, live=moved.release)
    assert record_waiting(object_store, runs) == 0


def test_a_night_that_failed_because_the_bucket_was_away_waits_in_the_folder_of_its_run(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect("away", f"http://{LOOPBACK}:{free_port()}")
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    job = write_project(tmp_path, name="away")
    run = FlowRun(flow_id=uuid4(), parameters={"job": str(job), "why": "night 9"})
    asyncio.run(record_failure(retrain, run, Failed(message="the bucket does not answer")))
    waiting = tmp_path / "home" / "runs" / "away" / str(run.id) / WAITING
    said = json.loads(waiting.read_text())
    assert (said["decision"], said["why"], said["live"]) == (FAILED, "the bucket does not answer", "")
    assert said["asked"].startswith("night 9 (")


def test_an_answer_that_did_arrive_while_its_reply_was_lost_is_no_obstacle(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    one = decided(0, FAILED, "twice")
    record_decision(object_store, one)
    keep_until_recorded(tmp_path / "r0", one)
    assert record_waiting(object_store, tmp_path) == 1
    assert read_decisions(Channel(object_store, "twice", "prod"), 5) == [one]


def test_what_was_to_be_said_of_a_run_that_is_killed_is_not_said_when_it_spoke_itself_or_is_at_work(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    for name in ("spoke", "works"):
        keep_until_recorded(tmp_path / name, dataclasses.replace(decided(0, FAILED, "killed"), flow_run=name))
    own = dataclasses.replace(decided(1, PROMOTED, "killed"), flow_run="spoke")
    # Its reply was lost, or it was killed right after: what waits is still there.
    record_decision(object_store, own)
    assert record_waiting(object_store, tmp_path, tmp_path / "works") == 1
    assert read_decisions(Channel(object_store, "killed", "prod"), 5) == [own]
    assert [path.parent.name for path in tmp_path.glob(f"*/{WAITING}")] == ["works"]
    record_decision(object_store, dataclasses.replace(own, flow_run="works"), tmp_path / "works")
    assert not list(tmp_path.glob(f"*/{WAITING}"))


def test_a_streak_is_of_skips_since_the_last_other_answer(object_store: ObjectStore, tmp_path: Path) -> None:
    job, project = load_job(write_project(tmp_path, name="streak"))
    plan = RetrainPlan(
        job_file=JobFile(job=job, project=project), channel=Channel(object_store, "streak"), settings=Settings.load(),
        flow_run_id="r", asked="ada", live=None, changed={}, inputs="", skip="nothing", start=None, began=0.0,
        read_seconds=0.0,
    )  # fmt: skip
    assert streak(plan) == 0
    record_decision(object_store, dataclasses.replace(decided(0, SKIPPED, "streak"), streak=13))
    object_store.put_new(f"{decisions_prefix('streak', 'prod')}20251117T080000.000000Z-r.json", b"{}")
    assert streak(plan) == 13
    record_decision(object_store, decided(1, KEPT, "streak"))
    assert streak(plan) == 0

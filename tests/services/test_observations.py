"""Observations from a server's memory to whoever reads them, over a real store that refuses, is away, or is late."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from shipreader.observation_files import encode
from shipreader.observations import Observer
from tests.support.fault_proxy import Answer, DropReply, DropRequest, FaultProxy, Rule
from tests.support.fixture_types import Connect, Ship
from tests.support.releases import MODEL, move
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.maintenance.observed import kept_days
from train_and_ship.registry.observations import reading, rows
from train_and_ship.registry.observations.reading import Cursor, Found, labelled, read_between, read_new
from train_and_ship.registry.release.manifest import Manifest, build_manifest

PREFIX = "observations/digits/"
RELEASE = "0123456789abcdef0123"
COLUMNS = {"inputs": ["age"], "outputs": ["score"]}
Observe = Callable[..., Observer]


@pytest.fixture
def observe(object_store: ObjectStore, connect: Connect, proxy: FaultProxy) -> Observe:
    """An observer of the same bucket as `object_store`, through the proxy."""
    connect(object_store.bucket, proxy.url)
    client = s3_client(Settings.load())
    # One request for each try: what is tried again is the observer's.
    client.meta.config.retries = {"total_max_attempts": 1}

    def make(**options: Any) -> Observer:
        chosen = {"seconds": 60, "columns": COLUMNS, "parquet": False, **options}
        return Observer("digits", bucket=object_store.bucket, client=client, **chosen)

    return make


def ids(found: Found) -> list[str]:
    return [row.request_id for row in found.rows]


@pytest.mark.parametrize("parquet", [False, True])
def test_rows_are_read_once_by_a_cursor_that_is_kept_as_json(
    object_store: ObjectStore, observe: Observe, parquet: bool
) -> None:
    observer = observe(parquet=parquet)
    for number in range(3):
        observer.observe(
            request_id=f"r-{number}", key=number, release=RELEASE, generation=7, latency_ms=number, rollout="ab",
            arm="candidate", fell_back=True, error="KeyError", inputs={"age": [number, 0.5]}, outputs={"score": "cat"},
        )  # fmt: skip
    observer.observe(request_id="bare")
    assert observer.flush()
    first = read_new(object_store, "digits", columns=COLUMNS)
    assert ids(first) == ["r-0", "r-1", "r-2", "bare"] and not first.more and not +first.left_out and not first.said
    row = first.rows[1]
    assert abs(row.at - datetime.now(UTC)) < timedelta(minutes=2)
    assert dataclasses.asdict(row) == {
        "request_id": "r-1", "key_slot": row.key_slot, "at": row.at, "release": RELEASE, "generation": 7,
        "rollout": "ab", "arm": "candidate", "latency_ms": 1.0, "error": "KeyError", "fell_back": True,
        "inputs": {"age": [1, 0.5]}, "outputs": {"score": "cat"},
    }  # fmt: skip
    assert first.rows[3].inputs == {} and first.rows[3].key_slot is None and first.rows[3].latency_ms is None
    observer.observe(request_id="later")
    observer.label("r-1", 1.0)
    observer.close()
    cursor = Cursor.of(json.loads(json.dumps(first.cursor.document())))
    second = read_new(object_store, "digits", cursor, columns=COLUMNS)
    assert ids(second) == ["later"]
    assert [(one.request_id, label.value) for one, label in labelled(first.rows, second.labels)] == [("r-1", 1.0)]
    third = read_new(object_store, "digits", second.cursor)
    assert (third.rows, third.labels, third.cursor) == ([], [], second.cursor)
    # By time, for labels that came later; what the job does not name any more is left out.
    now = datetime.now(UTC)
    again = read_between(object_store, "digits", now - timedelta(hours=1), now)
    assert sorted(ids(again)) == ["bare", "later", "r-0", "r-1", "r-2"] and again.rows[0].inputs == {}
    assert again.left_out["values of columns that the job does not name"] == (0 if parquet else 6)


def test_a_call_that_ends_early_goes_on_where_it_ended(object_store: ObjectStore, observe: Observe) -> None:
    observer = observe(rows=1)
    for number in range(5):
        observer.observe(request_id=str(number))
    assert observer.flush()
    found, read = Found(more=True), list[str]()
    calls = 0
    while found.more:
        found = read_new(object_store, "digits", found.cursor, most_rows=2)
        read += ids(found)
        calls += 1
    assert sorted(read) == list("01234") and calls == 3
    observer.close()


def test_a_reply_that_is_lost_makes_one_file_and_one_row(
    object_store: ObjectStore, observe: Observe, proxy: FaultProxy
) -> None:
    proxy.add(Rule(DropReply(), method="PUT", path="/observations/", times=1))
    observer = observe()
    observer.observe(request_id="once")
    assert observer.flush() and observer.status().written == 1
    assert len(object_store.list_keys(PREFIX)) == 1
    assert ids(read_new(object_store, "digits")) == ["once"]
    observer.close()


@pytest.mark.parametrize("fault", [Answer(403, "AccessDenied"), Answer(503, "SlowDown"), DropRequest()])
def test_a_bucket_that_refuses_or_is_away_stops_no_request_and_gets_all_of_it_after(
    object_store: ObjectStore, observe: Observe, proxy: FaultProxy, fault: Any
) -> None:
    proxy.add(Rule(fault, method="PUT", path="/observations/"))
    observer = observe(seconds=0.05)
    slowest = 0.0
    for number in range(200):
        began = time.perf_counter()
        assert observer.observe(request_id=str(number))
        slowest = max(slowest, time.perf_counter() - began)
        if number % 20 == 0:
            time.sleep(0.01)
    ends = time.monotonic() + 20
    while not observer.status().problem:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert observer.status().written == 0 and object_store.list_keys(PREFIX) == {} and slowest < 1
    proxy.rules.clear()
    assert observer.flush() and observer.status().problem == "" and observer.status().dropped == 0
    assert sorted(ids(read_new(object_store, "digits")), key=int) == [str(number) for number in range(200)]
    observer.close()


def put(store: ObjectStore, rows: list[dict[str, Any]], *, at: datetime | None = None, parquet: bool = False) -> str:
    """A file as an observer would have named it, whatever its rows are."""
    when = at or datetime.now(UTC)
    name, body = encode([{**row} for row in rows], "0" * 8, labels=False, parquet=parquet)
    place = f"{PREFIX}{when:%Y-%m-%d}/{when:%H}-{name.partition('/')[2][3:]}"
    store.put(place, body)
    return place


def row(**changes: Any) -> dict[str, Any]:
    return {
        "request_id": "r", "key_slot": 5, "time": f"{datetime.now(UTC).isoformat()}", "release": RELEASE,
        "generation": 1, "rollout": "", "arm": "live", "latency_ms": 1.0, "error": "", "fell_back": False,
        "inputs": {}, "outputs": {}, **changes,
    }  # fmt: skip


def put_raw(store: ObjectStore, body: bytes, kind: str = "jsonl.gz", sha256: str = "") -> str:
    now = datetime.now(UTC)
    sha256 = sha256 or hashlib.sha256(body).hexdigest()[:16]
    key = f"{PREFIX}{now:%Y-%m-%d}/{now:%H}-00000000-{sha256}.{kind}"
    store.put(key, body)
    return key


def parquet(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def test_what_is_torn_altered_too_long_or_no_such_file_is_skipped_and_said_and_the_rest_is_read(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FILE_BYTES", 2**16)
    monkeypatch.setattr(rows, "TEXT_BYTES", 2**17)
    good = gzip.compress(json.dumps(row()).encode())
    put_raw(object_store, good)
    bad = {
        "torn": put_raw(object_store, good[:-9]),
        "torn or altered": put_raw(object_store, good + b"x", sha256="0" * 16),
        "expected gzip, got": put_raw(object_store, b"no gzip"),
        "bytes unpacked, got more": put_raw(object_store, gzip.compress(b"\n" * (2**17 + 1))),
        "expected at most 65,536 bytes": put_raw(object_store, b"\0" * (2**16 + 1)),
        "expected Parquet": put_raw(object_store, b"PAR1 no PAR1", "parquet"),
        "got binary": put_raw(object_store, parquet({"request_id": pyarrow.array([b"x"])}), "parquet"),
        "got list<": put_raw(object_store, parquet({"request_id": pyarrow.array([[["x"]]])}), "parquet"),
        "rows of 131,072 bytes": put_raw(
            object_store, parquet({"request_id": pyarrow.array(["x"] * 20_001)}), "parquet"
        ),
        "20,000 rows": put_raw(object_store, gzip.compress(b"{}\n" * 20_001)),
    }
    now = datetime.now(UTC)
    # Of no name that an observer gives.
    for other in ("x", f"{now:%Y-%m-%d}/{now:%H}-x.jsonl.gz", f"{now:%Y-%m-%d}/nothing"):
        object_store.put(PREFIX + other, good)
    found = read_new(object_store, "digits")
    assert ids(found) == ["r"] and found.left_out["files that cannot be read"] == len(bad) == len(found.said)
    for words, key in bad.items():
        assert any(said.startswith(f"{key}: ") and words in said for said in found.said), words
    # Once.
    assert read_new(object_store, "digits", found.cursor).said == []


def test_rows_of_other_shapes_from_the_future_from_before_their_release_and_repeated_are_counted_apart(
    object_store: ObjectStore,
) -> None:
    now = datetime.now(UTC)
    wrong = [
        {"request_id": ""}, {"request_id": "x" * 129}, {"request_id": 7}, {"key_slot": 10_000}, {"key_slot": True},
        {"time": "now"}, {"time": 5}, {"time": "2026-12-01T00:00:00"}, {"release": "../x"}, {"generation": -1},
        {"generation": 1.5}, {"rollout": None}, {"arm": "other"}, {"latency_ms": -1}, {"latency_ms": "1"},
        {"error": 1}, {"fell_back": 1}, {"inputs": []}, {"inputs": {"age": {}}}, {"inputs": {"age": [1] * 65}},
        {"inputs": {"age": "x" * 513}}, {"outputs": {"score": [[1]]}},
        {"inputs": {str(number): 1 for number in range(101)}},
    ]  # fmt: skip
    put(object_store, [row(**changes) for changes in wrong])
    body = b'{"request_id"\n[1]\nnull\n' + b"[" * 5000 + b"\n" + json.dumps(row(latency_ms=float("nan"))).encode()
    put_raw(object_store, gzip.compress(body))
    twice = row(request_id="twice", inputs={"age": 1, "secret": 2})
    put(object_store, [twice, twice, row(request_id="future", time=(now + timedelta(hours=1)).isoformat())])
    put(object_store, [row(request_id="early", time=(now - timedelta(hours=1)).isoformat())])
    put(object_store, [row(request_id="other", release="f" * 20, time=(now - timedelta(hours=1)).isoformat())])
    # The same rows in another file: a copy.
    put(object_store, [row(request_id="one"), twice])
    found = read_new(object_store, "digits", columns=COLUMNS, live_since={RELEASE: now - timedelta(minutes=30)})
    assert sorted(ids(found)) == ["one", "other", "twice"]
    assert found.left_out == {
        "malformed": len(wrong) + 5, "repeated": 2, "from the future": 1, "from before their release": 1,
        "values of columns that the job does not name": 3,
    }  # fmt: skip


def test_a_file_that_comes_late_is_read_unless_it_is_too_late(object_store: ObjectStore) -> None:
    now = datetime.now(UTC)
    put(object_store, [row(request_id="now")])
    found = read_new(object_store, "digits")
    for hours in (3, 30):
        put(object_store, [row(request_id=f"{hours} hours")], at=now - timedelta(hours=hours))
    assert ids(read_new(object_store, "digits", found.cursor)) == ["3 hours"]


KILLED = """
import os, sys, time
from shipreader.observations import Observer
observer = Observer("digits", bucket=os.environ["SHIP_BUCKET"], seconds=0.5, parquet=False)
for number in range(40):
    observer.observe(request_id=str(number))
    print(number, flush=True)
    time.sleep(0.05)
time.sleep(60)
"""


def test_a_process_that_is_killed_loses_what_was_in_memory_and_no_file_is_torn(object_store: ObjectStore) -> None:
    with subprocess.Popen([sys.executable, "-P", "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "39\n":
                break
        process.send_signal(signal.SIGKILL)
    found = read_new(object_store, "digits")
    assert found.said == [] and not +found.left_out
    read = sorted(map(int, ids(found)))
    # 0.5 s are ten rows; the client is made meanwhile.
    assert read == list(range(len(read))) and len(read) >= 10


def release_keeping(store: ObjectStore, folder: Path, job: str) -> Manifest:
    """Published, with such a job."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "job.json").write_text(job)
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature={}, metrics={})
    publish(store, folder, manifest)
    return manifest


def test_gc_deletes_what_is_older_than_the_live_jobs_say_and_without_apply_only_says_so(
    object_store: ObjectStore, tmp_path: Path, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(object_store, [row()])
    object_store.put(f"{PREFIX}no-date/x", b"other")
    # Of a server whose clock is wrong.
    future = put(object_store, [row()], at=datetime.now(UTC) + timedelta(days=400))
    others = "observations/faces/2026-01-01/00-00000000-0123456789abcdef.parquet"
    object_store.put(others, b"")
    before = object_store.list_keys("observations/")
    move(
        object_store, release_keeping(object_store, tmp_path / "a", '{"observe": {"keep_days": 3}}'), channel="staging"
    )
    move(object_store, release_keeping(object_store, tmp_path / "b", '{"observe": {"keep_days": 5}}'))
    now = ObjectStore.now

    def days_later(days: float) -> None:
        monkeypatch.setattr(ObjectStore, "now", lambda self: now(self) + timedelta(days=days))

    assert kept_days(object_store, MODEL) == 5
    days_later(4.9)
    assert "observations" not in ship("gc", MODEL, "--apply").output
    days_later(5.1)
    assert f"{MODEL}: 3 files of observations" in ship("gc", MODEL).output
    assert object_store.list_keys("observations/") == before
    assert re.search(
        rf"{MODEL}: 3 files of observations .* deleted: older than 5 days", ship("gc", MODEL, "--apply").output
    )
    assert list(object_store.list_keys("observations/")) == [others] and future in before


@pytest.mark.parametrize(
    ("job", "days"),
    [
        ('{"name": "x"}', 30),
        ('{"observe": {}}', 30),
        ('{"observe": {"keep_days": 0}}', None),
        ("{", None),
        ("[]", None),
    ],
)
def test_how_long_is_as_the_job_says_a_month_where_none_does_and_unknown_where_it_cannot_be_read(
    object_store: ObjectStore, tmp_path: Path, job: str, days: int | None
) -> None:
    assert kept_days(object_store, MODEL) == 30
    move(object_store, release_keeping(object_store, tmp_path / "a", job))
    if days is not None:
        assert kept_days(object_store, MODEL) == days
    else:
        with pytest.raises(ReleaseError, match="the job of release"):
            kept_days(object_store, MODEL)

"""What servers say of requests: kept in memory, written in time, bounded, and never in a request's way."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError

from shipreader.errors import ReaderError
from shipreader.kept import Kept, kept_by_job
from shipreader.observation_files import FILE_NAME, encode
from shipreader.observation_sending import Folder, Forwarder, put_once
from shipreader.observations import Observer
from shipreader.split import slot_of

RELEASE = "0123456789abcdef0123"
COLUMNS = {"inputs": ["age", "name", "x"], "outputs": ["score"]}


class Files:
    """In place of a bucket: what was written, by name; `away` while it does not answer."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {}
        self.away = False

    def __call__(self, name: str, body: bytes) -> None:
        if self.away:
            raise OSError("no answer")
        self.written[name] = body

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for body in self.written.values() for line in gzip.decompress(body).splitlines()]


@pytest.fixture
def files() -> Files:
    return Files()


def make(files: Files, **options: Any) -> Observer:
    return Observer("digits", **{"put": files, "parquet": False, "columns": COLUMNS, "seconds": 60, **options})


def test_a_row_says_who_was_answered_by_what_and_keeps_the_columns_that_are_named(files: Files) -> None:
    observer = make(files)
    given = {"age": 31, "name": "ada", "secret": "not named"}
    kept = observer.observe(
        request_id="r-1", key="ada@example.com", latency_ms=3.5, inputs=given, outputs={"score": 0.25, "more": 1},
        release=RELEASE, generation=7, rollout="ab", arm="candidate", fell_back=True, error=ValueError("who knows"),
    )  # fmt: skip
    assert observer.flush() and kept == "r-1"
    ((name, _),) = files.written.items()
    (row,) = files.rows
    assert abs(time.time() - time.mktime(time.strptime(row.pop("time")[:19], "%Y-%m-%dT%H:%M:%S")) + time.timezone) < 60
    assert row == {
        "request_id": "r-1", "key_slot": slot_of("digits", "ada@example.com"), "release": RELEASE, "generation": 7,
        "rollout": "ab", "arm": "candidate", "latency_ms": 3.5, "error": "ValueError", "fell_back": True,
        "inputs": {"age": 31, "name": "ada"}, "outputs": {"score": 0.25},
    }  # fmt: skip
    assert FILE_NAME.fullmatch(name) and "ada@" not in str(files.rows)
    observer.close()


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (True, True),
        (2**63, None),
        (float("nan"), None),
        ("é" * 600, "é" * 512),
        ([1, 2.5], [1, 2.5]),
        (((1, 2), (3, 4)), [1, 2, 3, 4]),
        ([0] * 65, None),
        ([1, "a"], None),
        ({"a": 1}, None),
        (b"bytes", None),
        (np.float32(0.5), 0.5),
        (np.array(7), 7),
        (np.array([[0.25]]), 0.25),
        (np.array([]), []),
        (np.ones((1, 64), np.float32), [1.0] * 64),
        (np.zeros((3, 224, 224)), None),
        (np.array([1, np.inf]), [1, None]),
        (np.array(["a"]), "a"),
        (np.array(["a", "b"]), None),
    ],
)
def test_numbers_texts_and_short_vectors_are_kept_and_nothing_longer(files: Files, value: Any, kept: Any) -> None:
    observer = make(files)
    observer.observe(inputs={"x": value})
    assert observer.flush()
    assert files.rows[0]["inputs"] == {"x": kept}
    observer.close()


def test_lists_that_hold_themselves_end() -> None:
    observer, loop = make(Files()), []
    loop.append(loop)
    observer.observe(inputs={"x": loop})
    assert observer.status().left_out == 1
    observer.close()


def test_what_cannot_be_observed_fails_no_request_and_is_counted(files: Files) -> None:
    observer = make(files)

    class Hostile:
        size = 3

        def tolist(self) -> list[float]:
            raise RuntimeError("gone")

    assert observer.observe(inputs={"x": Hostile()}) == ""
    assert observer.observe(request_id="ok", key="\ud800", inputs={"name": "\ud800"}) == "ok"
    assert observer.flush() and observer.status().dropped == 1
    assert files.rows[0]["key_slot"] is None and files.rows[0]["inputs"] == {"name": "?"}
    observer.close()


def test_a_sample_takes_the_same_requests_in_each_process_and_about_as_many_as_it_says(files: Files) -> None:
    one, two = make(files, sample=0.1), make(files, sample=0.1)
    ids = [f"r-{number}" for number in range(2000)]
    taken = [request for request in ids if one.observe(request_id=request)]
    assert taken == [request for request in ids if two.observe(request_id=request)]
    assert 150 < len(taken) < 250
    assert 30 < sum(bool(one.observe()) for _ in range(500)) < 80
    one.close()
    two.close()


def test_a_full_batch_is_written_before_its_time_and_a_small_one_in_time(files: Files) -> None:
    observer = make(files, rows=10, seconds=0.05)
    for _ in range(10):
        observer.observe()
    wait_until(lambda: len(files.rows) == 10)
    observer.observe()
    wait_until(lambda: len(files.rows) == 11)
    observer.close()


def test_while_the_bucket_is_away_memory_is_bounded_the_oldest_goes_first_and_all_else_is_written_after(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.away = True
    observer = make(files, rows=10, waiting_bytes=2000)
    for number in range(300):
        observer.observe(request_id=f"r-{number}")
        if number % 10 == 9:
            wait_until(lambda: not observer._rows)
    assert not observer.flush(0)
    status = observer.status()
    assert 0 < status.waiting_bytes <= 2000 and status.problem == "no answer" and status.written == 0
    files.away = False
    assert observer.flush()
    assert [row["request_id"] for row in files.rows] == [f"r-{number}" for number in range(status.dropped, 300)]
    assert observer.status().problem == "" and observer.status().written == 300 - status.dropped > 0
    # Once each, however many there were.
    assert len([one for one in caplog.messages if "cannot be written" in one]) == 1
    assert len([one for one in caplog.messages if "are dropped" in one]) == 1
    observer.close()


def test_a_full_buffer_drops_what_comes_and_counts_it_without_waiting(files: Files) -> None:
    gate = threading.Event()
    observer = make(files, put=lambda *_: gate.wait(20), rows=1, buffer_bytes=6000)
    began = time.monotonic()
    kept = [observer.observe() for _ in range(100)]
    assert time.monotonic() - began < 5
    # What is with the thread, which waits for the store, and a buffer full.
    assert 9 <= sum(map(bool, kept)) <= 21 and observer.status().dropped == 100 - sum(map(bool, kept))
    gate.set()
    observer.close()


def test_the_same_rows_have_the_same_name_in_both_formats_and_mixed_types_are_lines(files: Files) -> None:
    row = {
        "request_id": "a", "key_slot": None, "time": "2026-12-01T04:05:06.007Z", "release": RELEASE, "generation": 1,
        "rollout": "", "arm": "live", "latency_ms": 1.0, "error": "", "fell_back": False, "outputs": {},
    }  # fmt: skip
    for parquet, kind in ((False, ".jsonl.gz"), (True, ".parquet")):
        rows = [{**row, "inputs": {"age": 1}}, {**row, "inputs": {"age": 2.5, "v": [1.0, 2.0]}}, {**row, "inputs": {}}]
        one, two = (encode(rows, "0" * 8, labels=False, parquet=parquet) for _ in range(2))
        assert one == two and one[0].startswith("2026-12-01/04-00000000-") and one[0].endswith(kind)
    mixed = [{**row, "inputs": {"age": 1}}, {**row, "inputs": {"age": "one"}}]
    assert encode(mixed, "0" * 8, labels=False, parquet=True)[0].endswith(".jsonl.gz")


def test_labels_lie_beside_the_rows_under_names_of_their_own(files: Files) -> None:
    observer = make(files)
    observer.label("r-1", True)
    observer.label("r-2", "cat", name="kind")
    for wrong in (None, [1], float("nan"), b"x"):
        with pytest.raises(ReaderError, match="expected a finite number or a text"):
            observer.label("r-1", wrong)
    with pytest.raises(ReaderError, match="request_id: expected"):
        observer.label("", 1)
    assert observer.flush()
    ((name, _),) = files.written.items()
    assert "/labels-" in name
    assert [(row["request_id"], row["name"], row["value"]) for row in files.rows] == [
        ("r-1", "label", True),
        ("r-2", "kind", "cat"),
    ]
    observer.close()


def release_with(folder: Path, text: str | None) -> Any:
    if text is not None:
        (folder / "job.json").write_text(text)
    return SimpleNamespace(folder=folder, id=RELEASE, generation=7, model="digits")


def test_the_live_release_says_what_is_kept_and_the_next_one_may_say_otherwise(files: Files, tmp_path: Path) -> None:
    observer = Observer("digits", put=files, parquet=False)
    observer.observe(inputs={"age": 1})
    observer.use(release_with(tmp_path, '{"observe": {"columns": {"inputs": ["age"]}, "sample": 1.0}}'))
    observer.observe(inputs={"age": 2, "name": "ada"})
    observer.use(release_with(tmp_path, '{"name": "digits"}'))
    observer.observe(inputs={"age": 3})
    assert observer.flush()
    assert [(row["inputs"], row["release"], row["generation"]) for row in files.rows] == [
        ({}, "", 0),
        ({"age": 2}, RELEASE, 7),
        ({}, RELEASE, 7),
    ]
    observer.close()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"observe": 3}',
        '{"observe": {"columns": {"inputs": "age"}}}',
        '{"observe": {"columns": {"other": []}}}',
        '{"observe": {"sample": 0}}',
        '{"observe": {"sample": true}}',
        '{"observe": {"columns": {"inputs": [1]}}}',
        json.dumps({"observe": {"columns": {"inputs": [str(number) for number in range(101)]}}}),
        '{"observe": {}, "more": "' + "x" * 2**20 + '"}',
    ],
)
def test_a_job_that_says_it_in_no_way_that_can_be_read_has_nothing_kept(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert kept_by_job(release_with(tmp_path, text)) is None
    assert "nothing of requests is kept" in caplog.text


def test_a_job_without_the_key_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept_by_job(release_with(tmp_path, None)) is None
    assert kept_by_job(release_with(tmp_path, '{"observe": null}')) is None
    assert kept_by_job(release_with(tmp_path, '{"observe": {}}')) == Kept()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "A b"}, "model name"),
        ({"bucket": "", "put": None}, "bucket: expected its name"),
        ({"sample": 1.5}, "sample: expected a share"),
        ({"rows": 0}, "1 to 20,000 rows"),
        ({"seconds": 0}, "seconds above 0"),
        ({"columns": {"inputs": "age"}}, "expected lists of names"),
        ({"columns": ["age"]}, "columns: expected inputs and outputs"),
    ],
)
def test_mistakes_are_told_where_it_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ReaderError, match=said):
        Observer(**{"model": "digits", "bucket": "models", **options})


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from shipreader.observation_sending import Folder, Forwarder, put_once
from shipreader.observations import Observer
folder = Path(sys.argv[1])
def put(name, body):
    time.sleep(0.2)
    (folder / name.replace("/", "_")).write_bytes(body)
if "own" in sys.argv:
    def own(number, frame):
        (folder / "handler").write_text("called")
        sys.exit(3)
    signal.signal(signal.SIGTERM, own)
observer = Observer("digits", put=put, parquet=False, seconds=60)
if "hook" in sys.argv: observer.close_on_sigterm()
for number in range(50): observer.observe(request_id=str(number))
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        observer.observe(request_id="child")
        sys.exit(0)
    os.waitpid(child, 0)
print("ready", flush=True)
if "end" not in sys.argv: time.sleep(60)
"""


def run(folder: Path, *words: str, number: int | None = None) -> tuple[int, list[str]]:
    """How the process ended, and the ids that are written then."""
    argv = [sys.executable, "-P", "-c", SCRIPT, str(folder), *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if number is not None:
            process.send_signal(number)
        code = process.wait(30)
    lines = [line for path in folder.glob("*.gz") for line in gzip.decompress(path.read_bytes()).splitlines()]
    return code, [json.loads(line)["request_id"] for line in lines]


ALL = [str(number) for number in range(50)]


def test_nothing_is_lost_at_sigterm_and_the_process_ends_by_it_all_the_same(tmp_path: Path) -> None:
    assert run(tmp_path, "hook", number=signal.SIGTERM) == (-signal.SIGTERM, ALL)


def test_a_handler_of_ones_own_is_called_as_before_and_nothing_is_lost(tmp_path: Path) -> None:
    assert run(tmp_path, "own", "hook", number=signal.SIGTERM) == (3, ALL)
    assert (tmp_path / "handler").exists()


def test_the_end_of_the_interpreter_writes_what_there_is_and_a_forked_child_its_own(tmp_path: Path) -> None:
    code, found = run(tmp_path, "end", "fork")
    assert code == 0 and sorted(found) == sorted([*ALL, "child"])


def wait_until(happened: Any) -> None:
    ends = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.01)


class Store:
    """In place of a boto3 client: what was put, by key."""

    exceptions = SimpleNamespace(ClientError=ClientError)

    def __init__(self) -> None:
        self.put: dict[str, bytes] = {}
        self.status = 200
        self.asked: list[dict[str, Any]] = []

    def put_object(self, *, Bucket: str, Key: str, Body: bytes, **condition: str) -> None:
        self.asked.append(condition)
        if self.status != 200 and (self.status != 501 or condition):
            answer: Any = {"Error": {}, "ResponseMetadata": {"HTTPStatusCode": self.status}}
            raise ClientError(answer, "PutObject")
        self.put[f"{Bucket}/{Key}"] = Body


NAMES = [f"2026-12-01/04-00000000-{number:016x}.jsonl.gz" for number in range(4)]


def test_what_another_process_leaves_in_a_folder_is_brought_away_once_the_bucket_takes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = Store(), Folder(tmp_path / "observations")
    forwarder = Forwarder("digits", bucket="models", client=store, folder=folder.path)
    assert forwarder.send()
    for name in NAMES:
        folder.put(name, name.encode())
    (folder.path / "other").write_bytes(b"stays")
    (folder.path / "2026-12-01_..").write_bytes(b"stays")
    store.status = 403
    assert not forwarder.send() and not forwarder.send() and forwarder.problem
    # Not each of them, while the store refuses one.
    assert len(store.asked) == 2 and len([one for one in caplog.messages if "wait in" in one]) == 1
    store.status = 200
    assert forwarder.send() and not forwarder.problem and len(folder.waiting()) == 0
    assert store.put == {f"models/observations/digits/{name}": name.encode() for name in NAMES}
    assert {path.name for path in folder.path.iterdir()} == {"other", "2026-12-01_.."}


def test_what_waits_in_a_folder_is_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    store, folder = Store(), Folder(tmp_path)
    store.status = 503
    for index, name in enumerate(NAMES):
        folder.put(name, b"x" * 10)
        os.utime(tmp_path / name.replace("/", "_"), (index, index))
    forwarder = Forwarder("digits", bucket="models", client=store, folder=tmp_path, limit=25)
    assert not forwarder.send()
    assert [name for _, name, _ in folder.waiting()] == NAMES[2:] and forwarder.dropped == 2
    store.status = 200
    forwarder.close()
    assert len(store.put) == 2


@pytest.mark.parametrize(("status", "known"), [(412, True), (501, False)])
def test_a_file_that_is_there_already_is_written_and_a_store_without_conditions_is_asked_without(
    status: int, known: bool
) -> None:
    store = Store()
    store.status = status
    assert put_once(store, "models", "k", b"") is known
    assert store.asked == [{"IfNoneMatch": "*"}, *([] if known else [{}])]

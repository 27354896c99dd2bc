"""Who may move a channel, or publish, writes records that nobody of us would: enormous, absurd, of another time."""

from __future__ import annotations

import hashlib
import json
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from shipreader import records
from shipreader.errors import RefusedError
from tests.support.releases import CHANNEL, MODEL, NOWHERE, make_release, move, rolled_back
from train_and_ship.infra.errors import AnsweredError, ReleaseError, RequestError
from train_and_ship.infra.objectstore import RECORD_BYTES, ObjectStore
from train_and_ship.registry.bucket.catalog import channels
from train_and_ship.registry.bucket.keys import decisions_prefix, pointer_key, views_prefix
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.tombstones import MARK_BYTES, read_claims, read_tombstone, tombstone_key
from train_and_ship.registry.channels import decisions
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import KEPT, SKIPPED, Decision, read_decisions, record_decision
from train_and_ship.registry.channels.history import find_record, read_history, record_key
from train_and_ship.registry.channels.moves import require_not_stale
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, decode_pointer, read_pointer
from train_and_ship.registry.channels.targets import choose_rollback
from train_and_ship.registry.channels.timeline import doubts, holes, live_at, numbers, rollback_target
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.history_repair import repair_history
from train_and_ship.registry.maintenance.retention import Policy, Step, _in_views, decide
from train_and_ship.registry.release.manifest import LINEAGE, Manifest, build_manifest, decode_manifest
from train_and_ship.registry.tracking import rest
from train_and_ship.registry.tracking.rest import TAG_RELEASE, RestRegistry
from train_and_ship.ship.status import channel_statuses

KEEP = Policy(keep_last=2, slowest_reader=timedelta(0))
MOVE = Pointer(
    model=MODEL, channel=CHANNEL, generation=1, release="a" * 20, manifest_sha256="b" * 64, previous=None, nonce="n",
    moved_at="2025-11-24T00:00:00.000+00:00", moved_by="ada", reason="", flow_run="", mlflow_version="",
)  # fmt: skip


@pytest.fixture
def three(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Three releases, live one after the other."""
    manifests = [make_release(tmp_path / str(seed), seed, files=1) for seed in range(3)]
    for seed, manifest in enumerate(manifests):
        publish(object_store, tmp_path / str(seed), manifest)
        move(object_store, manifest)
    return manifests


@pytest.fixture
def channel(object_store: ObjectStore) -> Channel:
    return Channel(object_store, MODEL, CHANNEL, NOWHERE)


def claim_key(release: str) -> str:
    return f"models/{MODEL}/claims/{release}.json"


def findings(store: ObjectStore) -> list[str]:
    return [one.what for one in examine(store, MODEL, NOWHERE) if "aliases" not in one.what]


# ---- enormous


def test_no_record_is_read_that_is_longer_than_any_of_ours(
    object_store: ObjectStore, three: list[Manifest], channel: Channel
) -> None:
    release = three[0].release
    asked: dict[str, Callable[[], object]] = {
        pointer_key(MODEL, CHANNEL): lambda: read_pointer(channel),
        record_key(MODEL, CHANNEL, 1): lambda: find_record(channel, 1),
        tombstone_key(MODEL, release): lambda: read_tombstone(object_store, MODEL, release),
    }
    for key, read in asked.items():
        object_store.put(key, b" " * (RECORD_BYTES + 1))
        with pytest.raises(ReleaseError, match=f"{key}: expected at most [0-9,]+ bytes in .*, got 1,048,577"):
            read()
    # Nor is any of it held: a bucket takes objects of terabytes.
    with pytest.raises(ReleaseError, match="expected at most 1,000 bytes"):
        object_store.get(pointer_key(MODEL, CHANNEL), 1000)


class Answers(BaseHTTPRequestHandler):
    """An MLflow whose versions have tags without end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        tags = [{"key": "x", "value": "y" * 1000}, {"key": TAG_RELEASE, "value": "a" * 20}]
        body = json.dumps({"model_version": {"tags": tags}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""


def test_of_a_reply_of_mlflow_no_more_is_read_than_ours_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = RestRegistry(f"http://127.0.0.1:{server.server_port}")
        assert registry.release(MODEL, "1") == "a" * 20
        monkeypatch.setattr(rest, "REPLY_BYTES", 1000)
        with pytest.raises(AnsweredError, match="answered model-versions/get with more than 1,000 bytes"):
            registry.release(MODEL, "1")
        server.shutdown()


def test_enormous_claims_and_views_stop_no_collector(object_store: ObjectStore, three: list[Manifest]) -> None:
    object_store.put(claim_key(three[0].release), b" " * (MARK_BYTES + 1))
    object_store.put(f"{views_prefix(MODEL)}{CHANNEL}/triton/{MODEL}/config.pbtxt", b"#" * (RECORD_BYTES + 1))
    assert {one.release: one.step for one in decide(object_store, MODEL, KEEP)}[three[0].release] is Step.KEEP


def test_claims_of_releases_that_there_are_not_are_not_read(
    object_store: ObjectStore, three: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        object_store.put(claim_key(f"{number:020x}"), b"{}")
    asked: list[str] = []
    get = ObjectStore.get

    def watched(self: ObjectStore, key: str, most: int = RECORD_BYTES) -> tuple[bytes, str] | None:
        asked.append(key)
        return get(self, key, most)

    monkeypatch.setattr(ObjectStore, "get", watched)
    decide(object_store, MODEL, KEEP)
    assert not [key for key in asked if "/claims/" in key]


def test_a_manifest_of_many_small_values_is_refused_before_it_is_read() -> None:
    encoded = b'{"format":1,"signature":[' + b"[]," * 700_000 + b"0]}"
    pointer = records.Pointer(MODEL, CHANNEL, 1, "a" * 20, hashlib.sha256(encoded).hexdigest(), "n", "")
    tracemalloc.start()
    with pytest.raises(ReleaseError, match="expected at most 600,000 values"):
        decode_manifest(encoded)
    with pytest.raises(RefusedError, match="expected JSON"):
        records.decode_manifest(encoded, pointer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_of_a_view_only_the_release_that_it_names_is_held(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = f"# {MODEL} release {'a' * 20}\n".encode().ljust(RECORD_BYTES, b"#")
    keys = dict.fromkeys(
        [f"{views_prefix(MODEL)}{CHANNEL}/kserve/{i}/{MODEL}/config.pbtxt" for i in range(1, 65)], RECORD_BYTES
    )
    monkeypatch.setattr(ObjectStore, "list_keys", lambda self, prefix: keys)
    monkeypatch.setattr(ObjectStore, "get", lambda self, key: (bytes(bytearray(long)), ""))
    tracemalloc.start()
    found = list(_in_views(object_store, MODEL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("a" * 20, key) for key in keys]
    # Eight are read at the same time.
    assert peak < 32 * 2**20


def test_a_record_of_more_verdicts_than_gates_is_none() -> None:
    encoded = {
        number: replace(MOVE, verdicts={f"{i:04}": "" for i in range(number)}).encode() for number in (1000, 1001)
    }
    assert len(decode_pointer(encoded[1000], "key").verdicts) == 1000
    assert records.decode_pointer(encoded[1000], MODEL, CHANNEL).generation == 1
    with pytest.raises(ReleaseError, match="expected at most 1,000 verdicts, got 1,001"):
        decode_pointer(encoded[1001], "key")
    with pytest.raises(RefusedError, match="expected at most 1,000 verdicts"):
        records.decode_pointer(encoded[1001], MODEL, CHANNEL)


def test_a_decision_of_more_changes_than_there_can_be_is_none(
    object_store: ObjectStore, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    record_decision(object_store, decision(1, changed={str(i): "" for i in range(1001)}))
    assert read_decisions(channel, 5) == [] and "1,001 changes" in caplog.text


def test_what_a_decision_quotes_of_a_live_release_is_cut_so_that_it_can_be_read(
    object_store: ObjectStore, channel: Channel
) -> None:
    absurd = "x" * 2_000_000 + "\ud800"
    record_decision(object_store, decision(1, why=absurd, asked=absurd, changed={"environment": absurd}))
    (found,) = read_decisions(channel, 1)
    cut = "x" * 9_999 + "…"
    assert (found.why, found.asked, found.changed) == (cut, cut, {"environment": cut})
    record_decision(object_store, decision(2, why="half \ud800"))
    assert read_decisions(channel, 1)[0].why == "half \\ud800"


def test_decisions_that_cannot_be_read_hide_the_last_that_can_up_to_a_number(
    object_store: ObjectStore, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = decision(0)
    record_decision(object_store, ours)
    for number in range(1, 4):
        key = f"{decisions_prefix(MODEL, CHANNEL)}202511{17 + number}T020000.000000Z-r.json"
        object_store.put(key, b" " * (RECORD_BYTES + 1))
    assert read_decisions(channel, 1) == [ours] and read_decisions(channel, 30) == [ours]
    # Whoever may write decisions may write any number of them.
    monkeypatch.setattr(decisions, "PASSED_OVER", 1)
    assert read_decisions(channel, 1) == []


def test_a_table_shows_what_is_live_beside_a_decision_that_cannot_be_read(
    object_store: ObjectStore, three: list[Manifest]
) -> None:
    object_store.put(f"{decisions_prefix(MODEL, CHANNEL)}20251117T020000.000000Z-r.json", b"{}")
    (row,) = channel_statuses(object_store, {})
    assert row.live is not None and (row.live.release, row.unreadable) == (three[2].release, "")


# ---- absurd


def manifest_with(**changes: Any) -> bytes:
    files = changes.pop("files", '{"model.onnx":{"bytes":1,"sha256":"%s"}}' % ("0" * 64))
    said = {"formats": '{"onnx":"model.onnx"}', "metrics": "{}", "signature": "{}", **changes}
    release = hashlib.sha256(files.encode()).hexdigest()[:20]
    parts = ",".join(f'"{name}":{said[name]}' for name in ("formats",))
    return (
        f'{{"files":{files},"format":1,{parts},"metrics":{said["metrics"]},"model":"{MODEL}","release":"{release}",'
        f'"signature":{said["signature"]}}}'
    ).encode()


def both_refuse(encoded: bytes) -> None:
    release = json.loads(encoded.replace(b"1e400", b"1"))["release"]
    pointer = records.Pointer(MODEL, CHANNEL, 1, release, hashlib.sha256(encoded).hexdigest(), "n", "")
    with pytest.raises(RefusedError, match="expected"):
        records.decode_manifest(encoded, pointer)
    with pytest.raises(ReleaseError, match="expected"):
        decode_manifest(encoded)


def test_the_manifest_of_these_tests_is_one() -> None:
    assert decode_manifest(manifest_with()).formats == {"onnx": "model.onnx"}


@pytest.mark.parametrize("size", ["1e400", "-1", "1125899906842625", "9" * 400, "NaN", "true", "1.0"])
def test_sizes_that_no_file_has_are_refused(size: str) -> None:
    both_refuse(manifest_with(files='{{"model.onnx":{{"bytes":{},"sha256":"{}"}}}}'.format(size, "0" * 64)))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "9" * 400, "true", '"1"', "[1]"])
def test_metrics_that_are_no_numbers_are_refused(value: str) -> None:
    both_refuse(manifest_with(metrics=f'{{"accuracy":{value}}}'))


TENSOR = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}


@pytest.mark.parametrize(
    "signature",
    [
        {"inputs": 5},
        {"inputs": [{}]},
        {"inputs": [{**TENSOR, "shape": "batch"}]},
        {"inputs": [{**TENSOR, "shape": [["batch"]]}]},
        {"inputs": [{**TENSOR, "shape": [-1]}]},
        {"inputs": [{**TENSOR, "shape": [2**60]}]},
        {"inputs": [{**TENSOR, "shape": [1.5]}]},
        {"inputs": [{**TENSOR, "name": "x\n} parameters {"}]},
        {"inputs": [{**TENSOR, "name": ""}]},
        {"inputs": [{**TENSOR, "dtype": "float32 } {"}]},
        {"inputs": [{**TENSOR, "dtype": None}]},
        {"outputs": [TENSOR, TENSOR]},
        {"dims": [{"name": "batch", "min": 1}]},
        {"dims": [{"name": "batch", "min": 5, "max": 2}]},
        {"dims": [{"name": "batch", "min": 1, "max": "64"}]},
        {"dims": "batch"},
        {"coupled": "no"},
    ],
    ids=str,
)
def test_signatures_that_servers_could_not_take_for_granted_are_refused(signature: dict[str, Any]) -> None:
    both_refuse(manifest_with(signature=canonical_json(signature).decode()))


@pytest.mark.parametrize("kind", ["", "on nx", "onnx\x1b[2J", "a" * 64])
def test_formats_with_names_that_are_none_are_refused(kind: str) -> None:
    both_refuse(manifest_with(formats=json.dumps({kind: "model.onnx"}, ensure_ascii=False)))


def test_a_release_that_no_reader_would_take_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_and_ship.registry.release.manifest.MOST_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ReleaseError, match="expected 1 to 2 files"):
        build_manifest(tmp_path, model=MODEL, formats={}, signature={}, metrics={})


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 10**9},
        {"generation": -1},
        {"moved_at": "2025-11-24T00:00:00"},
        {"moved_at": "soon"},
        {"moved_at": "0001-01-01T00:00:00+14:00"},
        {"moved_at": "9999-12-31T23:59:59-12:00"},
    ],
    ids=str,
)
def test_moves_that_nobody_could_have_made_are_refused(change: dict[str, Any]) -> None:
    encoded = canonical_json({**json.loads(MOVE.encode()), **change})
    with pytest.raises(ReleaseError, match="expected the record of a move"):
        decode_pointer(encoded, "key")


def test_what_no_parser_reads_is_no_record_and_no_traceback(object_store: ObjectStore) -> None:
    release = "a" * 20
    for encoded in (b"[" * 5000, b'{"a":' * 5000, b'{"format":' + b"9" * 5000 + b"}", b"\xff\xfe"):
        with pytest.raises(ReleaseError):
            decode_pointer(encoded, "key")
        with pytest.raises(ReleaseError):
            decode_manifest(encoded)
        with pytest.raises(RefusedError):
            records.decode_pointer(encoded, MODEL, CHANNEL)
        object_store.put(claim_key(release), encoded)
        assert read_claims(object_store, MODEL)[release].by == ""
        object_store.put(tombstone_key(MODEL, release), encoded)
        with pytest.raises(ReleaseError, match="expected the mark of a release"):
            read_tombstone(object_store, MODEL, release)


def test_a_history_that_says_it_is_endless_costs_nothing() -> None:
    history = [replace(MOVE, generation=3), replace(MOVE, generation=99_999_999, moved_at="")]
    tracemalloc.start()
    lost, unknown = holes(history), doubts(history, history[0])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert numbers(lost) == "1 to 2, 4 to 99999998" and numbers([unknown]) == "4 to 99999998"


def test_a_pointer_of_an_absurd_generation_leaves_a_history_that_can_be_read(
    object_store: ObjectStore, three: list[Manifest], channel: Channel
) -> None:
    live = read_pointer(channel)
    assert live is not None
    object_store.replace(pointer_key(MODEL, CHANNEL), replace(live, generation=90_000_000).encode(), live.etag)
    assert [one.generation for one in read_history(channel)] == [1, 2, 3, 90_000_000]
    repaired = repair_history(channel, dry_run=True)
    assert (repaired.partial, repaired.lost) == ((89_999_999,), (range(4, 89_999_999),))


def test_a_history_that_would_fill_the_memory_is_not_read(
    object_store: ObjectStore, three: list[Manifest], channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_and_ship.registry.channels.history.RECORDS_BYTES", 500)
    with pytest.raises(ReleaseError, match=r"history/prod/: expected records of at most 500 bytes in all, got"):
        read_history(channel)
    # Whoever goes back reads one record, not all of them.
    assert choose_rollback(channel, "").release == three[1].release


def test_rollbacks_to_what_was_never_live_are_followed_in_linear_time() -> None:
    moves = [replace(MOVE, generation=number, release=f"{number:020x}", kind=ROLLBACK) for number in range(1, 61)]
    asked: list[int] = []

    def read(generation: int) -> Pointer:
        asked.append(generation)
        return moves[generation - 1]

    assert rollback_target(moves[-1], read) == moves[-2]
    assert len(asked) == len(set(asked)) <= 60
    many = [replace(MOVE, generation=number, release=f"{number:020x}", kind=ROLLBACK) for number in range(1, 1000)]
    with pytest.raises(RequestError, match="name a release with --to"):
        rollback_target(many[-1], lambda generation: many[generation - 1])


# ---- that contradict each other, or themselves


def test_a_record_of_another_move_leads_nobody_in_circles(
    object_store: ObjectStore, three: list[Manifest], channel: Channel
) -> None:
    third = find_record(channel, 3)
    assert third is not None
    object_store.put(record_key(MODEL, CHANNEL, 2), third.encode())
    with pytest.raises(
        ReleaseError, match=r"00000002\.json: expected the record of that move, got the one of .*03\.json"
    ):
        choose_rollback(channel, "")
    with pytest.raises(ReleaseError, match="expected the record of that move"):
        decide(object_store, MODEL, KEEP)
    # The others are shown, and what is wrong is said.
    assert [one.generation for one in read_history(channel)] == [1, 3]
    assert any(
        "the record of generation 2 is not there" in one and "holds something else" in one
        for one in findings(object_store)
    )


def test_a_rollback_follows_no_record_that_the_next_one_contradicts(
    object_store: ObjectStore, three: list[Manifest], channel: Channel
) -> None:
    second = find_record(channel, 2)
    assert second is not None
    object_store.put(record_key(MODEL, CHANNEL, 2), replace(second, release=three[0].release).encode())
    with pytest.raises(
        RequestError, match=f"generation 3 replaced {three[1].release}, but .* says that {three[0].release}"
    ):
        choose_rollback(channel, "")
    assert choose_rollback(channel, three[1].release).release == three[1].release
    # Neither is deleted: nobody knows which of the two is right.
    kept = {one.release: one.why for one in decide(object_store, MODEL, KEEP) if one.step is Step.KEEP}
    assert three[1].release in kept and three[0].release in kept


def test_a_record_that_lies_there_before_its_move_keeps_nobody_from_moving(
    object_store: ObjectStore, three: list[Manifest], channel: Channel
) -> None:
    object_store.put(record_key(MODEL, CHANNEL, 4), b"taken")
    object_store.put(record_key(MODEL, CHANNEL, 7), replace(MOVE, generation=7).encode())
    object_store.put(f"models/{MODEL}/history/{CHANNEL}/", b"")
    assert rolled_back(object_store).release == three[1].release
    assert move(object_store, three[2]).generation == 5
    assert rolled_back(object_store, three[0].release).generation == 6
    assert [one.generation for one in read_history(channel)] == [1, 2, 3, 5, 6]
    assert any("record of generation 4 is not there" in one for one in findings(object_store))
    assert move(object_store, three[1]).generation == 7
    assert live_at(read_history(channel), datetime.now(UTC)) == read_pointer(channel)


def test_a_claim_of_no_time_counts_at_the_stores_own(object_store: ObjectStore, three: list[Manifest]) -> None:
    for at in ("2025-11-17T02:00:00", "yesterday", "9999-12-31T23:59:59-12:00", 7, None):
        body = json.dumps({"against": "", "at": at, "by": "somebody"}).encode()
        object_store.put(claim_key(three[0].release), body)
        assert {one.release: one.step for one in decide(object_store, MODEL, KEEP)}[three[0].release] is Step.KEEP


def test_a_record_whose_own_hash_is_wrong_is_told_and_stops_nothing_else(
    object_store: ObjectStore, three: list[Manifest], channel: Channel, store_url: str
) -> None:
    client = boto3.client("s3", endpoint_url=store_url)
    for key in (claim_key(three[0].release), pointer_key("faces", CHANNEL)):
        client.put_object(Bucket=object_store.bucket, Key=key, Body=b"{}", Metadata={"sha256": "0" * 64})
    with pytest.raises(ReleaseError, match=f"expected SHA-256 {'0' * 64}, as its writer said, .* twice") as caught:
        object_store.get(claim_key(three[0].release))
    assert not caught.value.retryable
    assert {one.release: one.step for one in decide(object_store, MODEL, KEEP)}[three[0].release] is Step.KEEP
    rows = {row.model: row for row in channel_statuses(object_store, {})}
    assert rows["faces"].unreadable and rows[MODEL].live == read_pointer(channel)


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidRequest"), (403, "AccessDenied")])
def test_a_record_that_its_writer_encrypted_with_a_key_of_their_own_stops_nothing_else(
    object_store: ObjectStore, three: list[Manifest], monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    """Stores answer so: 400 without the customer's key, 403 without a right on the key of KMS."""
    client, hidden = object_store._client, (claim_key(three[0].release), pointer_key("faces", CHANNEL))
    for key in hidden:
        object_store.put(key, b"{}")
    get = client.get_object

    def refusing(**request: Any) -> Any:
        if request["Key"] in hidden:
            said = {"Error": {"Code": code, "Message": "encrypted"}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise client.exceptions.ClientError(said, "GetObject")  # type: ignore[arg-type]
        return get(**request)

    monkeypatch.setattr(client, "get_object", refusing)
    assert {one.release: one.step for one in decide(object_store, MODEL, KEEP)}[three[0].release] is Step.KEEP
    rows = {row.model: row for row in channel_statuses(object_store, {})}
    assert rows["faces"].unreadable and rows[MODEL].live is not None


# ---- of another time, or of another


def decision(number: int, **changes: Any) -> Decision:
    at = datetime(2025, 11, 17, 2, tzinfo=UTC) + timedelta(days=number)
    said = {"why": "because", "flow_run": f"r{number}", "asked": "ada", "live": "a" * 20}
    return Decision(
        model=MODEL, channel=CHANNEL, decision=KEPT, at=at.isoformat(timespec="milliseconds"), **{**said, **changes}
    )


def test_decisions_of_the_future_of_others_and_of_no_shape_hide_none_of_ours(
    object_store: ObjectStore, channel: Channel
) -> None:
    ours = decision(0)
    record_decision(object_store, ours)
    record_decision(object_store, replace(decision(1), at="2999-01-01T00:00:00.000+00:00", decision=SKIPPED))
    prefix = decisions_prefix(MODEL, CHANNEL)
    copied = replace(decision(2), channel="staging").encode()
    object_store.put(f"{prefix}20251119T020000.000000Z-r2.json", copied)
    for number, change in enumerate(
        [{"seconds": "NaN"}, {"why": {}}, {"streak": 10**30}, {"at": "2025-11-20T02:00:00"}, {"candidate": "../.."}], 3
    ):
        document = {**json.loads(decision(number).encode()), **change}
        object_store.put(f"{prefix}202511{17 + number}T020000.000000Z-r{number}.json", json.dumps(document).encode())
    object_store.put(f"{prefix}99999999T999999.999999Z-r9.json", b"{}")
    object_store.put(f"{prefix}zzz.json", b"{}")
    assert read_decisions(channel, 30) == [ours]


def test_a_live_release_that_says_it_was_begun_in_the_future_keeps_no_run_out(
    object_store: ObjectStore, channel: Channel, tmp_path: Path
) -> None:
    for number, begun in enumerate(["2999-01-01T00:00:00+00:00", "~", 7, "2025-11-17T00:00:00"]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / LINEAGE).write_text(json.dumps({"begun": begun}))
        manifest = build_manifest(folder, model=MODEL, formats={}, signature={}, metrics={})
        publish(object_store, folder, manifest)
        require_not_stale(channel, "f" * 20, move(object_store, manifest), "2025-11-18T00:00:00.000+00:00")


def test_a_release_that_was_just_taken_off_is_not_deleted_because_a_record_says_that_it_was_long_ago(
    object_store: ObjectStore, three: list[Manifest], channel: Channel, tmp_path: Path
) -> None:
    week = Policy(keep_last=2, slowest_reader=timedelta(hours=1))
    for generation in (2, 3):
        record = find_record(channel, generation)
        assert record is not None
        object_store.put(
            record_key(MODEL, CHANNEL, generation), replace(record, moved_at="2020-01-01T00:00:00+00:00").encode()
        )
    live = read_pointer(channel)
    assert live is not None
    forged = replace(live, moved_at="2020-01-01T00:00:00+00:00")
    object_store.replace(pointer_key(MODEL, CHANNEL), forged.encode(), live.etag)
    found = {one.release: one for one in decide(object_store, MODEL, week)}[three[0].release]
    assert found.step is Step.KEEP and "still live" in found.why


def test_channels_are_listed_by_names_that_channels_can_have(object_store: ObjectStore, three: list[Manifest]) -> None:
    for name in ("Prod", "a b", "x\x1b[2J", "a" * 64):
        object_store.put(f"models/{MODEL}/channels/{name}.json", b"{}")
    assert channels(object_store, MODEL) == [CHANNEL]

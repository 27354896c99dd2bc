"""Releases and channels in a real S3 server, also when the network and other promoters get in the way."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra import objectstore
from infra.errors import GateError, PreconditionFailed, ReleaseError, ServiceError, SettingsError, StoreRefused
from infra.objectstore import LOCAL_PART_BYTES, ObjectStore
from infra.settings import Settings
from registry.channels import Accept, move_channel
from registry.history import read_history
from registry.keys import pointer_key, release_prefix
from registry.pointer import Pointer, read_pointer
from registry.release import MANIFEST, Manifest, build_manifest, verify_folder
from registry.releases import fetch_release, publish, verify_release
from tests.services.conftest import Connect, S3Server, free_port
from tests.services.fault_proxy import (
    Answer,
    AnswerAfter,
    Damage,
    DropReply,
    DropRequest,
    Fault,
    FaultProxy,
    Forward,
    PassOn,
    Reply,
    Request,
    Rule,
    StripHeaders,
)

REPOSITORY = Path(__file__).parent.parent.parent
MODEL, CHANNEL = "digits", "prod"
POINTER = "/channels/"
CONDITIONS = ("if-match", "if-none-match")


def make_release(folder: Path, seed: int = 0, accuracy: float = 0.97, files: int = 4) -> Manifest:
    """A small release in a new folder; another seed is another release."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for index in range(files):
        (folder / f"file{index}.bin").write_bytes(generator.randbytes(1000 + index))
    return build_manifest(
        folder, model=MODEL, formats={"onnx": "file0.bin"}, signature={}, metrics={"accuracy": accuracy}
    )


def published(store: ObjectStore, folder: Path, seed: int = 0, accuracy: float = 0.97) -> Manifest:
    manifest = make_release(folder, seed, accuracy)
    publish(store, folder, manifest)
    return manifest


def move(store: ObjectStore, manifest: Manifest, accept: Accept | None = None, **changes: Any) -> Pointer:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "channel": CHANNEL,
        "reason": "all gates passed",
        "moved_by": "tester",
        "flow_run": "run-1",
        "mlflow_version": "7",
        "accept": accept,
        **changes,
    }
    return move_channel(store, manifest, **arguments)


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    """Every promise is kept on both kinds of server."""
    return each_store_url


@pytest.fixture
def faulty(connect: Connect, bucket: str, proxy: FaultProxy) -> ObjectStore:
    """The same bucket as `object_store`, reached through the proxy and found trustworthy before any fault."""
    store = connect(bucket, proxy.url)
    store.probe()
    return store


def key_of(manifest: Manifest, name: str) -> str:
    return release_prefix(manifest.model, manifest.release) + name


# ---- the store itself


def test_a_good_store_is_trusted_and_left_clean(object_store: ObjectStore) -> None:
    object_store.probe()
    assert object_store.list_keys("") == {}


def test_the_probe_runs_once_for_each_store(faulty: ObjectStore, proxy: FaultProxy) -> None:
    seen = len(proxy.requests)
    faulty.probe()
    assert len(proxy.requests) == seen


@pytest.mark.parametrize("header", CONDITIONS)
def test_a_store_that_ignores_a_condition_is_refused(
    connect: Connect, bucket: str, proxy: FaultProxy, header: str, tmp_path: Path
) -> None:
    proxy.add(Rule(StripHeaders((header,))))
    store = connect(bucket, proxy.url)
    with pytest.raises(StoreRefused, match="replaced") as caught:
        publish(store, tmp_path / "release", make_release(tmp_path / "release"))
    assert not caught.value.retryable
    assert store.list_keys("") == {}


def test_a_store_that_checks_conditions_only_most_of_the_time_is_refused(
    connect: Connect, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Rule(StripHeaders(CONDITIONS), "PUT", r"/race", times=2))
    with pytest.raises(StoreRefused, match=r"8 PUTs .* had \d winners, not 1"):
        connect(bucket, proxy.url).probe()


def test_a_store_that_does_not_know_a_condition_is_refused(connect: Connect, bucket: str, proxy: FaultProxy) -> None:
    proxy.add(Rule(Answer(501, "NotImplemented"), "PUT", "/conditions"))
    with pytest.raises(StoreRefused, match="does not implement If-None-Match"):
        connect(bucket, proxy.url).probe()


@pytest.mark.parametrize("key", ["/conditions", "/race", "/damaged"])
@pytest.mark.parametrize("fault", [DropReply(), AnswerAfter(500, "InternalError"), Answer(503, "SlowDown")], ids=str)
def test_a_good_store_is_not_refused_for_a_reply_that_was_lost(
    connect: Connect, bucket: str, proxy: FaultProxy, key: str, fault: Fault
) -> None:
    proxy.add(Rule(fault, "PUT", key, times=1))
    assert connect(bucket, proxy.url).probe() == connect(bucket).probe()


def test_a_store_that_wants_bare_etags_gets_them(connect: Connect, bucket: str, proxy: FaultProxy) -> None:
    quoted = Rule(Answer(412, "PreconditionFailed"), "PUT")
    proxy.add(quoted)
    quoted.matches = lambda request: request.headers.get("if-match", "").startswith('"')  # type: ignore[method-assign]
    store = connect(bucket, proxy.url)
    assert not store.probe().etag_quoted
    etag = store.put_new("key", b"1")
    assert store.replace("key", b"2", etag) != etag


def test_a_missing_bucket_is_named_with_what_to_do(connect: Connect) -> None:
    with pytest.raises(SettingsError, match=r"no bucket 'nowhere' at http://.*create it .* or set SHIP_BUCKET"):
        connect("nowhere").check()


def test_an_unreachable_store_is_named_with_what_to_do(connect: Connect) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match=rf"s3://models at {url}: no answer .*check AWS_ENDPOINT_URL") as caught:
        connect("models", url).check()
    assert caught.value.retryable


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_refused_credentials_are_a_mistake_to_mend(
    faulty: ObjectStore, proxy: FaultProxy, code: str, tmp_path: Path
) -> None:
    proxy.add(Rule(Answer(403, code)))
    with pytest.raises(SettingsError, match=r"refused these credentials.*AWS_ACCESS_KEY_ID") as caught:
        faulty.check()
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match=code):
        read_pointer(faulty, MODEL, CHANNEL)


def test_missing_credentials_are_named_with_what_to_do(
    connect: Connect, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(bucket)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"no usable credentials .*AWS_ACCESS_KEY_ID"):
        ObjectStore.from_settings(Settings.load()).check()


def test_an_impossible_address_is_named(connect: Connect) -> None:
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL: expected an address"):
        connect("models", "not an address")


def test_the_local_store_ignores_the_persons_own_aws_settings(
    connect: Connect, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHIP_S3_PORT", str(s3_server.port))
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    store = ObjectStore.from_settings(Settings.load())
    store.create_bucket_if_missing()
    store.create_bucket_if_missing()
    store.check()


def test_an_object_is_read_again_only_when_it_changed(object_store: ObjectStore) -> None:
    etag = object_store.put_new("key", b"1")
    assert object_store.get("key") == (b"1", etag)
    assert object_store.get_if_changed("key", etag) is None
    newer = object_store.replace("key", b"2", etag)
    assert object_store.get_if_changed("key", etag) == (b"2", newer)
    assert object_store.get("absent") is None
    assert object_store.head("absent") is None


def test_conditional_writes_say_when_they_did_not_happen(object_store: ObjectStore) -> None:
    etag = object_store.put_new("key", b"1")
    with pytest.raises(PreconditionFailed):
        object_store.put_new("key", b"2")
    object_store.replace("key", b"2", etag)
    with pytest.raises(PreconditionFailed):
        object_store.replace("key", b"3", etag)
    with pytest.raises(PreconditionFailed):
        object_store.replace("absent", b"3", etag)


# ---- releases


def test_a_release_is_published_and_fetched_as_it_was(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = make_release(tmp_path / "release")
    result = publish(object_store, tmp_path / "release", manifest)
    assert (result.sent_bytes, result.present_bytes) == (manifest.total_bytes, 0)
    assert verify_release(object_store, MODEL, manifest.release) == manifest
    assert fetch_release(object_store, MODEL, manifest.release, tmp_path / "copy") == manifest
    verify_folder(tmp_path / "copy", manifest)
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == manifest.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "release"]


def test_bytes_that_are_there_are_not_sent_again(faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    manifest = published(faulty, tmp_path / "release")
    before = len(proxy.sent("PUT", "/file"))
    again = publish(faulty, tmp_path / "release", manifest)
    assert (again.sent_bytes, again.present_bytes) == (0, manifest.total_bytes)
    assert len(proxy.sent("PUT", "/file")) == before == len(manifest.files)


def test_progress_ends_at_the_size_of_the_release(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = make_release(tmp_path / "release")
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        seen.clear()
        publish(object_store, tmp_path / "release", manifest, lambda done, total: seen.append((done, total)))
        assert seen[-1] == (manifest.total_bytes, manifest.total_bytes)


def test_the_manifest_is_written_last(faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    manifest = published(faulty, tmp_path / "release")
    writes = [request.path for request in proxy.sent("PUT", "/releases/")]
    assert len(writes) == len(manifest.files) + 1
    assert MANIFEST in writes[-1]


UPLOADER = """
import sys
from pathlib import Path
from infra.objectstore import ObjectStore
from infra.settings import Settings
from registry.releases import publish
from registry.release import decode_manifest
folder = Path(sys.argv[1])
publish(ObjectStore.from_settings(Settings.load()), folder, decode_manifest(Path(sys.argv[2]).read_bytes()))
"""


def test_an_uploader_killed_in_the_middle_leaves_no_release_and_the_next_one_goes_on(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release", files=12)
    (tmp_path / "manifest").write_bytes(manifest.encode())
    started = threading.Event()
    uploader: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        started.wait()
        uploader[0].kill()

    proxy.add(Rule(PassOn(), "PUT", "/releases/", times=5))
    proxy.add(Rule(DropRequest(), "PUT", "/releases/", before=kill))
    # `faulty` has set the environment to the proxy's address.
    argv = [sys.executable, "-c", UPLOADER, str(tmp_path / "release"), str(tmp_path / "manifest")]
    uploader.append(subprocess.Popen(argv, cwd=REPOSITORY))
    started.set()
    assert uploader[0].wait(timeout=60) == -9

    present = object_store.list_keys(release_prefix(MODEL, manifest.release))
    assert 0 < len(present) <= 5 and not any(MANIFEST in key for key in present)
    with pytest.raises(ReleaseError, match="never published to the end"):
        move(object_store, manifest)
    assert read_pointer(object_store, MODEL, CHANNEL) is None

    result = publish(object_store, tmp_path / "release", manifest)
    assert result.present_bytes == sum(present.values())
    assert move(object_store, manifest).generation == 1


def test_a_file_deleted_from_the_bucket_makes_the_release_incomplete(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    proxy.add(Rule(Answer(404, "NoSuchKey"), "HEAD", "/file2.bin"))
    with pytest.raises(ReleaseError, match=r"file2\.bin: expected a file of 1,002 bytes in the bucket, got none"):
        move(faulty, manifest)


def test_a_file_altered_in_the_bucket_is_found(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    key = key_of(manifest, "file1.bin")
    stored = object_store.head(key)
    assert stored is not None
    object_store.replace(key, b"x" * stored.bytes, stored.etag)
    for attempt in (
        lambda: verify_release(object_store, MODEL, manifest.release),
        lambda: move(object_store, manifest),
        lambda: publish(object_store, tmp_path / "release", manifest),
        lambda: fetch_release(object_store, MODEL, manifest.release, tmp_path / "copy"),
    ):
        with pytest.raises(ReleaseError, match=r"file1\.bin.*expected SHA-256"):
            attempt()
    assert not (tmp_path / "copy").exists()


def test_an_altered_manifest_is_found(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    pointer = move(object_store, manifest)
    key = key_of(manifest, MANIFEST)
    stored = object_store.head(key)
    assert stored is not None
    better = {**json.loads(manifest.encode()), "metrics": {"accuracy": 1.0}}
    object_store.replace(key, json.dumps(better, sort_keys=True, separators=(",", ":")).encode(), stored.etag)
    with pytest.raises(ReleaseError, match="another description"):
        publish(object_store, tmp_path / "release", manifest)
    with pytest.raises(ReleaseError, match="altered after it went live"):
        fetch_release(object_store, MODEL, manifest.release, tmp_path / "x", manifest_sha256=pointer.manifest_sha256)
    other = published(object_store, tmp_path / "other", seed=1)
    with pytest.raises(ReleaseError, match="the live release of digits prod is broken"):
        move(object_store, other, accept=lambda pointer, live: None)
    # Asking nobody is the way out.
    assert move(object_store, other).generation == 2


def test_a_local_file_that_changed_after_hashing_is_not_sent(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = make_release(tmp_path / "release")
    (tmp_path / "release" / "file0.bin").write_bytes(b"x" * 1000)
    with pytest.raises(ReleaseError, match=r"file0\.bin: expected SHA-256"):
        publish(object_store, tmp_path / "release", manifest)
    assert object_store.head(key_of(manifest, "file0.bin")) is None


def test_other_bytes_that_appear_under_a_files_name_are_not_overwritten(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    key = key_of(manifest, "file3.bin")
    # After the publisher looked at what is there, right before its own PUT.
    proxy.add(Rule(PassOn(), "PUT", "/file3.bin", times=1, before=lambda: ignore(object_store.put_new(key, b"other"))))
    with pytest.raises(ReleaseError, match=r"file3\.bin: expected 1,003 bytes in the bucket, got 5"):
        publish(faulty, tmp_path / "release", manifest)
    found = object_store.get(key)
    assert found is not None and found[0] == b"other"
    assert object_store.head(key_of(manifest, MANIFEST)) is None


def test_bytes_damaged_on_the_way_are_refused_by_the_store_and_sent_again(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    damage = proxy.add(Rule(Damage(), "PUT", "/file3.bin"))
    # One compares the checksum, the other what was signed.
    with pytest.raises(ServiceError, match=r"BadDigest|XAmzContentSHA256Mismatch") as caught:
        publish(faulty, tmp_path / "release", manifest)
    assert caught.value.retryable
    damage.times = damage.used
    publish(faulty, tmp_path / "release", manifest)
    fetch_release(object_store, MODEL, manifest.release, tmp_path / "copy")


def test_without_checksums_in_the_store_files_are_read_back(
    connect: Connect, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    checksums = StripHeaders(("x-amz-checksum-sha256", "x-amz-sdk-checksum-algorithm", "content-md5"))

    class Unchecked(StripHeaders):
        def apply(self, request: Request, forward: Forward) -> Reply | None:
            if "/file3.bin" not in request.path:
                return checksums.apply(request, forward)
            return Damage().apply(request, lambda damaged: checksums.apply(damaged, forward))

    proxy.add(Rule(Unchecked(()), "PUT"))
    store = connect(bucket, proxy.url)
    assert not store.probe().checks_bodies
    manifest = make_release(tmp_path / "release")
    with pytest.raises(ReleaseError, match=r"file3\.bin: expected SHA-256 .* when read back"):
        publish(store, tmp_path / "release", manifest)
    assert store.head(key_of(manifest, MANIFEST)) is None


def test_a_file_that_goes_up_in_parts_is_published_and_fetched(
    connect: Connect, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(objectstore, "MULTIPART_BYTES", LOCAL_PART_BYTES)
    monkeypatch.setattr(objectstore, "PART_BYTES", LOCAL_PART_BYTES)
    store = connect(bucket)
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(random.Random(0).randbytes(2 * LOCAL_PART_BYTES + 12_345))
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature={}, metrics={})
    seen: list[int] = []
    assert publish(store, folder, manifest, lambda done, _: seen.append(done)).present_bytes == 0
    assert seen[-1] == manifest.total_bytes and len(seen) >= 3
    assert publish(store, folder, manifest).sent_bytes == 0
    fetch_release(store, MODEL, manifest.release, tmp_path / "copy")
    verify_folder(tmp_path / "copy", manifest)
    stored = store.head(key_of(manifest, "model.onnx"))
    assert stored is not None and '-3"' in stored.etag


def test_two_publishers_of_the_same_release_both_succeed(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = make_release(tmp_path / "release", files=10)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: publish(object_store, tmp_path / "release", manifest), range(4)))
    assert all(result.sent_bytes + result.present_bytes == manifest.total_bytes for result in results)
    assert verify_release(object_store, MODEL, manifest.release) == manifest


def test_concurrent_fetches_of_one_release_end_in_one_verified_folder(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: fetch_release(object_store, MODEL, manifest.release, tmp_path / "copy"), range(4)):
            pass
    verify_folder(tmp_path / "copy", manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "release"]


# ---- channels


def test_an_unused_channel_has_no_pointer_and_no_history(object_store: ObjectStore) -> None:
    assert read_pointer(object_store, MODEL, CHANNEL) is None
    assert read_history(object_store, MODEL, CHANNEL) == []


def test_every_move_is_recorded(object_store: ObjectStore, tmp_path: Path) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    moves = [move(object_store, manifest, reason=f"move {n}") for n, manifest in enumerate(releases)]
    assert [pointer.generation for pointer in moves] == [1, 2, 3]
    assert [pointer.previous for pointer in moves] == [None, releases[0].release, releases[1].release]
    assert read_pointer(object_store, MODEL, CHANNEL) == moves[-1]
    assert read_history(object_store, MODEL, CHANNEL) == moves
    assert moves[2].reason == "move 2" and moves[2].moved_at.endswith("+00:00")


def test_channels_are_independent(object_store: ObjectStore, tmp_path: Path) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    assert move(object_store, second, channel="staging").generation == 1
    live = read_pointer(object_store, MODEL, CHANNEL)
    assert live is not None and live.release == first.release


def test_moving_to_what_is_live_changes_nothing(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    first = move(object_store, manifest)
    again = move(object_store, manifest, reason="again")
    assert again == first and again.etag == first.etag
    assert read_history(object_store, MODEL, CHANNEL) == [first]


def test_a_refused_candidate_leaves_the_channel_as_it_was(object_store: ObjectStore, tmp_path: Path) -> None:
    better, worse = published(object_store, tmp_path / "a", 0, 0.98), published(object_store, tmp_path / "b", 1, 0.90)
    live = move(object_store, better)
    with pytest.raises(GateError, match="worse"):
        move(object_store, worse, accept=not_worse_than_live(worse))
    assert read_pointer(object_store, MODEL, CHANNEL) == live
    assert read_history(object_store, MODEL, CHANNEL) == [live]


def not_worse_than_live(candidate: Manifest) -> Accept:
    def accept(pointer: Pointer | None, live: Manifest | None) -> None:
        if live is not None and candidate.metrics["accuracy"] < live.metrics["accuracy"]:
            raise GateError(f"worse than the live release {live.release}")

    return accept


def test_a_candidate_is_held_against_what_is_live_by_then(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    old = published(object_store, tmp_path / "old", 0, 0.90)
    candidate = published(object_store, tmp_path / "candidate", 1, 0.95)
    best = published(object_store, tmp_path / "best", 2, 0.99)
    move(object_store, old)
    # Between the candidate's last look and its PUT somebody else promotes a better release.
    proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=lambda: ignore(move(object_store, best))))
    asked: list[str | None] = []
    gate = not_worse_than_live(candidate)

    def accept(pointer: Pointer | None, live: Manifest | None) -> None:
        asked.append(live.release if live else None)
        gate(pointer, live)

    with pytest.raises(GateError, match=best.release):
        move(faulty, candidate, accept=accept)
    assert asked == [old.release, best.release]
    live = read_pointer(object_store, MODEL, CHANNEL)
    assert live is not None and live.release == best.release


def ignore(value: object) -> None:
    pass


def test_a_candidate_still_good_enough_follows_the_other_move(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    candidate, other = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=lambda: ignore(move(object_store, other))))
    pointer = move(faulty, candidate, accept=not_worse_than_live(candidate))
    assert (pointer.generation, pointer.previous) == (2, other.release)
    assert read_history(object_store, MODEL, CHANNEL)[-1] == pointer


LOST = [DropReply(), AnswerAfter(500, "InternalError"), AnswerAfter(503, "SlowDown"), AnswerAfter(409, "Conflict")]


@pytest.mark.parametrize("fault", LOST, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first move", "later move"])
def test_a_move_whose_reply_was_lost_is_recognised(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: Fault, first: bool
) -> None:
    if not first:
        move(object_store, published(object_store, tmp_path / "before", 5))
    candidate = published(object_store, tmp_path / "candidate")
    # Every repetition by the client library is lost as well.
    proxy.add(Rule(fault, "PUT", POINTER, times=3))
    pointer = move(faulty, candidate)
    history = read_history(object_store, MODEL, CHANNEL)
    assert read_pointer(object_store, MODEL, CHANNEL) == pointer == history[-1]
    assert [record.generation for record in history] == ([1] if first else [1, 2])


def test_a_move_whose_reply_was_lost_and_that_others_followed_is_recognised(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    mine, other = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    # Our PUT takes place, its reply and all repetitions are lost, and before we look somebody else moves on.
    proxy.add(Rule(DropReply(), "PUT", POINTER, times=1))
    proxy.add(Rule(DropRequest(), "PUT", POINTER, times=2))
    proxy.add(Rule(PassOn(), "GET", POINTER, times=1))
    proxy.add(Rule(PassOn(), "GET", POINTER, times=1, before=lambda: ignore(move(object_store, other))))
    pointer = move(faulty, mine)
    assert (pointer.generation, pointer.release) == (1, mine.release)
    history = read_history(object_store, MODEL, CHANNEL)
    assert [record.release for record in history] == [mine.release, other.release]
    assert len(proxy.sent("PUT", POINTER)) == 3


@pytest.mark.parametrize("fault", [Answer(500, "InternalError"), DropRequest(), Answer(503, "SlowDown")], ids=str)
def test_a_move_is_tried_again_after_a_fault(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    candidate = published(object_store, tmp_path / "candidate")
    proxy.add(Rule(fault, "PUT", POINTER, times=3))
    assert move(faulty, candidate).generation == 1


def test_a_move_that_cannot_be_done_says_so_and_can_be_repeated(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    candidate = published(object_store, tmp_path / "candidate")
    rule = proxy.add(Rule(Answer(400, "InvalidRequest"), "PUT", POINTER))
    with pytest.raises(ServiceError, match="InvalidRequest"):
        move(faulty, candidate)
    assert read_pointer(object_store, MODEL, CHANNEL) is None
    proxy.rules.remove(rule)
    assert move(faulty, candidate).generation == 1


def test_a_store_that_acknowledges_a_move_without_doing_it_is_not_believed(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    candidate = published(object_store, tmp_path / "candidate")

    class Lie(Answer):
        def apply(self, request: Any, forward: Any) -> Any:
            return Reply(200, [("ETag", '"0"')], b"")

    proxy.add(Rule(Lie(200, ""), "PUT", POINTER))
    with pytest.raises(ReleaseError, match="acknowledged generation 1"):
        move(faulty, candidate)


def test_a_mover_that_died_before_the_history_leaves_no_hole(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    broken = proxy.add(Rule(DropRequest(), "PUT", "/history/"))
    dead = move(faulty, first)
    assert object_store.list_keys(f"models/{MODEL}/history/") == {}
    assert read_history(object_store, MODEL, CHANNEL) == [dead]
    proxy.rules.remove(broken)
    after = move(object_store, second)
    assert read_history(object_store, MODEL, CHANNEL) == [dead, after]


def test_nothing_is_replaced_whose_record_cannot_be_kept(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    live = move(object_store, first)
    proxy.add(Rule(Answer(400, "InvalidRequest"), "PUT", "/history/"))
    with pytest.raises(ServiceError):
        move(faulty, second)
    assert read_pointer(object_store, MODEL, CHANNEL) == live


def test_generations_go_on_after_somebody_deleted_the_pointer(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    object_store.delete(pointer_key(MODEL, CHANNEL))
    assert move(object_store, second).generation == 2
    assert len(read_history(object_store, MODEL, CHANNEL)) == 2


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"format":2}', b"\xff"],
)
def test_a_damaged_pointer_is_refused(object_store: ObjectStore, tmp_path: Path, body: bytes) -> None:
    candidate = published(object_store, tmp_path / "candidate")
    object_store.put_new(pointer_key(MODEL, CHANNEL), body)
    with pytest.raises(ReleaseError, match=r"channels/prod\.json: expected"):
        move(object_store, candidate)


def test_racing_promoters_get_unique_generations_and_a_history_without_a_hole(
    connect: Connect, bucket: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    promoters, moves_each = 8, 4
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(promoters * moves_each)]
    stores = [connect(bucket) for _ in range(promoters)]
    start = threading.Barrier(promoters)

    def promote(number: int) -> list[Pointer]:
        start.wait()
        mine = releases[number::promoters]
        return [move(stores[number], manifest, accept=lambda pointer, live: None) for manifest in mine]

    with ThreadPoolExecutor(promoters) as pool:
        moves = [pointer for pointers in pool.map(promote, range(promoters)) for pointer in pointers]
    assert sorted(pointer.generation for pointer in moves) == list(range(1, promoters * moves_each + 1))
    history = read_history(object_store, MODEL, CHANNEL)
    assert history == sorted(moves, key=lambda pointer: pointer.generation)
    for before, after in itertools.pairwise(history):
        assert after.previous == before.release


def test_racing_promoters_survive_lost_replies(
    connect: Connect, bucket: str, object_store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    promoters, moves_each = 4, 3
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(promoters * moves_each)]
    stores = [connect(bucket, proxy.url) for _ in range(promoters)]
    for store in stores:
        store.probe()
    chance = random.Random(0)

    class Sometimes(DropReply):
        def apply(self, request: Any, forward: Any) -> Any:
            reply = forward(request)
            return None if chance.random() < 0.4 else reply

    proxy.add(Rule(Sometimes(), "PUT", POINTER))

    def promote(number: int) -> list[Pointer]:
        return [move(stores[number], manifest) for manifest in releases[number::promoters]]

    with ThreadPoolExecutor(promoters) as pool:
        moves = [pointer for pointers in pool.map(promote, range(promoters)) for pointer in pointers]
    history = read_history(object_store, MODEL, CHANNEL)
    assert [record.generation for record in history] == list(range(1, promoters * moves_each + 1))
    assert history == sorted(moves, key=lambda pointer: pointer.generation)


def test_a_killed_server_comes_back_with_everything_acknowledged(
    connect: Connect, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    server = S3Server(tmp_path_factory.mktemp("killed"), free_port())
    server.start()
    try:
        store = connect("models", server.url)
        store.create_bucket_if_missing()
        releases = [published(store, tmp_path / str(seed), seed) for seed in range(2)]
        moves = [move(store, manifest) for manifest in releases]
        server.kill()
        with pytest.raises(ServiceError):
            read_pointer(store, MODEL, CHANNEL)
        server.start()
        assert read_pointer(store, MODEL, CHANNEL) == moves[-1]
        assert read_history(store, MODEL, CHANNEL) == moves
        for manifest in releases:
            fetch_release(store, MODEL, manifest.release, tmp_path / f"{manifest.release}-copy")
        assert move(store, releases[0]).generation == 3
    finally:
        server.kill()

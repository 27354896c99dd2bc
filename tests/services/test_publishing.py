"""Releases into a real S3 server and back, also when the network and other publishers get in the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.fault_proxy import (
    Answer,
    Damage,
    DropRequest,
    FaultProxy,
    Forward,
    PassOn,
    Reply,
    Request,
    Rule,
    StripHeaders,
)
from tests.support.fixture_types import Connect
from tests.support.processes import PATIENCE
from tests.support.projects import REPOSITORY
from tests.support.releases import CHANNEL, MODEL, ignore, key_of, make_release, move, published
from train_and_ship.infra import objectstore
from train_and_ship.infra.errors import ReleaseError, ServiceError
from train_and_ship.infra.objectstore import LOCAL_PART_BYTES, ObjectStore
from train_and_ship.registry.bucket import releases
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import fetch_release, publish, verify_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.release.manifest import MANIFEST, build_manifest, verify_folder


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    """Every promise is kept on both kinds of server."""
    return each_store_url


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
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.release.manifest import decode_manifest
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
    assert uploader[0].wait(timeout=PATIENCE) == -9

    present = object_store.list_keys(release_prefix(MODEL, manifest.release))
    assert 0 < len(present) <= 5 and not any(MANIFEST in key for key in present)
    with pytest.raises(ReleaseError, match="never published to the end"):
        move(object_store, manifest)
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) is None

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


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 990])
def test_a_listing_in_parts_misses_no_file_and_finds_each_that_is_gone(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, at_once: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(releases, "LISTED_AT_ONCE", at_once)
    manifest = make_release(tmp_path / "release")
    etags = publish(object_store, tmp_path / "release", manifest).etags
    before = len(proxy.requests)
    assert verify_release(faulty, MODEL, manifest.release, etags=etags) == manifest
    assert [request.method for request in proxy.requests[before:]].count("HEAD") == 0
    for name in manifest.files:
        object_store.delete(key_of(manifest, name))
        with pytest.raises(ReleaseError, match=rf"{name}: expected a file of"):
            verify_release(object_store, MODEL, manifest.release, etags=etags)
        publish(object_store, tmp_path / "release", manifest)


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

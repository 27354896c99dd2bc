"""Files on their way into the bucket: in parts, with the right headers, from files that may change under us."""

from __future__ import annotations

import hashlib
import random
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth

from tests.support.fault_proxy import (
    Answer,
    Damage,
    DropReply,
    Fault,
    FaultProxy,
    Forward,
    PassOn,
    Reply,
    Request,
    Rule,
)
from tests.support.fixture_types import Connect
from tests.support.processes import PATIENCE
from tests.support.stack_servers import S3Server
from train_and_ship.infra import objectstore
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError
from train_and_ship.infra.multipart import Budget
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.release.manifest import build_manifest

PART = 5 * 2**20
"""S3's smallest."""
KEY = "models/digits/file.bin"


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    return each_store_url


@pytest.fixture
def parts(connect: Connect, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A store, reached through the proxy, to which everything above 5 MiB goes in parts of that size."""
    monkeypatch.setattr(objectstore, "MULTIPART_BYTES", PART)
    monkeypatch.setattr(objectstore, "PART_BYTES", PART)
    return connect(bucket, proxy.url)


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, str]:
    """A file of three parts and its hash."""
    content = random.Random(0).randbytes(2 * PART + 1234)
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def pending(store: ObjectStore) -> list[Any]:
    """Uploads that were begun and neither completed nor given up."""
    return list(store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []))


def test_a_large_file_arrives_in_parts_with_progress(parts: ObjectStore, large: tuple[Path, str]) -> None:
    path, sha256 = large
    seen: list[int] = []
    etag = parts.upload_file_new(path, KEY, sha256, seen.append)
    assert sorted(seen) == [1234, PART, PART]
    assert parts.hash(KEY) == (sha256, path.stat().st_size)
    stored = parts.head(KEY)
    assert stored is not None and stored.sha256 == sha256 and stored.etag == etag
    assert parts.list_objects("")[KEY].etag == etag


def test_a_part_is_signed_with_the_hash_that_it_carries_and_not_hashed_again_for_it(
    parts: ObjectStore, large: tuple[Path, str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    payload = S3SigV4Auth.payload

    def watched(auth: S3SigV4Auth, request: Any) -> Any:
        hashed.append(request.url)
        return payload(auth, request)

    monkeypatch.setattr(S3SigV4Auth, "payload", watched)
    parts.upload_file_new(large[0], KEY, large[1])
    assert hashed and not any("partNumber" in url for url in hashed)
    sent = [request for request in proxy.requests if "partNumber" in request.path]
    assert [request.headers["x-amz-content-sha256"] for request in sent] == [
        hashlib.sha256(request.body).hexdigest() for request in sent
    ]


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 2 * PART])
def test_files_of_any_size_arrive_whole(parts: ObjectStore, tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    parts.upload_file_new(path, KEY, sha256)
    assert parts.hash(KEY) == (sha256, size)


def test_a_file_that_is_replaced_while_it_is_downloaded_is_a_fault_and_no_race_that_was_lost(
    parts: ObjectStore, object_store: ObjectStore, proxy: FaultProxy, large: tuple[Path, str], tmp_path: Path
) -> None:
    path, sha256 = large
    parts.upload_file_new(path, KEY, sha256)

    def replace() -> None:
        object_store._client.put_object(Bucket=object_store.bucket, Key=KEY, Body=bytes(path.stat().st_size))

    # Its first range says which object the others have to be of.
    proxy.add(Rule(PassOn(), "GET", KEY, times=1))
    proxy.add(Rule(PassOn(), "GET", KEY, times=1, before=replace))
    with pytest.raises(ServiceError, match=r"cannot download .* did not match expected ETag"):
        parts.download_file(KEY, tmp_path / "copy")


def test_a_file_that_is_there_is_not_replaced(parts: ObjectStore, large: tuple[Path, str]) -> None:
    path, sha256 = large
    parts.put_new(KEY, b"other")
    with pytest.raises(PreconditionFailedError):
        parts.upload_file_new(path, KEY, sha256)
    assert parts.get(KEY) is not None and pending(parts) == []


def test_a_file_that_appears_while_parts_go_up_is_not_replaced_where_the_store_can_tell(
    parts: ObjectStore, proxy: FaultProxy, object_store: ObjectStore, large: tuple[Path, str], s3_server: S3Server
) -> None:
    path, sha256 = large
    end = r"file\.bin\?uploadId"
    proxy.add(Rule(PassOn(), "POST", end, before=lambda: print(object_store.put_new(KEY, b"other"))))
    if proxy.target != s3_server.url:
        # RGW 16 completes without looking: the object is ours, and whole.
        parts.upload_file_new(path, KEY, sha256)
        assert parts.hash(KEY) == (sha256, path.stat().st_size)
        return
    with pytest.raises(PreconditionFailedError):
        parts.upload_file_new(path, KEY, sha256)
    found = parts.get(KEY)
    assert found is not None and found[0] == b"other"


@pytest.mark.parametrize("large_file", [True, False], ids=["in parts", "in one"])
def test_a_file_that_is_not_what_it_should_be_becomes_no_object(
    parts: ObjectStore, large: tuple[Path, str], large_file: bool
) -> None:
    path, _ = large
    if not large_file:
        path.write_bytes(b"small")
    with pytest.raises(ReleaseError, match=r"file\.bin: expected SHA-256 00.* it changed; nothing of it was kept"):
        parts.upload_file_new(path, KEY, "00" * 32)
    assert parts.head(KEY) is None and pending(parts) == []


@pytest.mark.parametrize("fault", [Answer(400, "InvalidRequest"), Damage()], ids=str)
def test_a_part_that_cannot_be_sent_leaves_nothing(
    parts: ObjectStore, proxy: FaultProxy, large: tuple[Path, str], fault: Fault
) -> None:
    path, sha256 = large
    parts.probe()
    proxy.add(Rule(fault, "PUT", "partNumber=2"))
    with pytest.raises(ServiceError):
        parts.upload_file_new(path, KEY, sha256)
    assert parts.head(KEY) is None and pending(parts) == []


def test_an_upload_in_parts_whose_last_reply_was_lost_is_recognised(
    parts: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "file.bin").write_bytes(random.Random(1).randbytes(PART + 10))
    manifest = build_manifest(folder, model="digits", formats={}, signature={}, metrics={})
    proxy.add(Rule(DropReply(), "POST", "uploadId", times=1))
    publish(parts, folder, manifest)
    fetch_release(parts, "digits", manifest.release, tmp_path / "copy")


def test_no_acl_is_sent_and_the_key_of_the_settings_encrypts(
    connect: Connect, s3_server: S3Server, large: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """RGW would want a key server for it; MiniStack notes the key and stores as ever."""
    monkeypatch.setattr(objectstore, "MULTIPART_BYTES", PART)
    monkeypatch.setattr(objectstore, "PART_BYTES", PART)
    path, sha256 = large
    bucket = f"encrypted-{uuid.uuid4().hex[:8]}"
    with FaultProxy(s3_server.url) as proxy:
        connect(bucket, s3_server.url).create_bucket_if_missing()
        monkeypatch.setenv("SHIP_KMS_KEY_ID", "alias/models")
        store = connect(bucket, proxy.url)
        store.upload_file_new(path, KEY, sha256)
        store.put_new("small", b"1")
        begun = [request for request in proxy.requests if request.method == "POST" and "uploads" in request.path]
        whole = [request for request in proxy.sent("PUT", f"{bucket}/") if "partNumber" not in request.path]
        assert len(begun) == 1 and len(whole) >= 1
        for request in [*begun, *whole]:
            assert request.headers["x-amz-server-side-encryption"] == "aws:kms"
            assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/models"
        assert not [name for request in proxy.requests for name in request.headers if "acl" in name or "grant" in name]


def test_a_body_damaged_on_the_way_back_is_read_again_also_by_whoever_may_try_again(
    parts: ObjectStore, proxy: FaultProxy
) -> None:
    class DamageReply(PassOn):
        times = 0

        def apply(self, request: Request, forward: Forward) -> Reply | None:
            reply, self.times = forward(request), self.times + 1
            return Reply(reply.status, reply.headers, f"{self.times}".encode() + reply.body[1:])

    parts.put_new("key", b"content")
    proxy.add(Rule(DamageReply(), "GET", "key", times=1))
    found = parts.get("key")
    assert found is not None and found[0] == b"content"
    # In another way each time.
    proxy.add(Rule(DamageReply(), "GET", "key", times=2))
    with pytest.raises(ServiceError, match=r"expected SHA-256 .*: damaged on the way") as caught:
        parts.get("key")
    assert caught.value.retryable
    found = parts.get("key")
    assert found is not None and found[0] == b"content"


def test_a_budget_is_never_overdrawn_and_never_stuck() -> None:
    budget, held, largest = Budget(100), [0], [0]
    lock = threading.Lock()

    def work(count: int) -> None:
        for _ in range(20):
            with budget.of(count):
                with lock:
                    held[0] += min(count, 100)
                    largest[0] = max(largest[0], held[0])
                with lock:
                    held[0] -= min(count, 100)

    # One wants more than there is.
    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 30, 60, 99, 250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert 0 < largest[0] <= 100

"""Small files on their way into a real store by a library other than boto3: same requests, same promises."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import uuid
from pathlib import Path

import pytest

from tests.support.ceph_rgw import RgwServer
from tests.support.fault_proxy import (
    Answer,
    Damage,
    DropReply,
    FaultProxy,
    Forward,
    PassOn,
    Reply,
    Request,
    Rule,
    StripHeaders,
    fault_reply,
)
from tests.support.fixture_types import Connect
from tests.support.stack_servers import S3Server
from train_and_ship.infra.errors import ReleaseError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.small_files import MOST_FAILURES, SMALL_BYTES
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.release.manifest import Manifest, build_manifest

QUICK, USUAL = "object_store/", "Botocore/"
"""How the two call themselves."""


@pytest.fixture(scope="session")
def store_url(rgw_server: RgwServer) -> str:
    return rgw_server.url


@pytest.fixture
def store(connect: Connect, bucket: str, proxy: FaultProxy) -> ObjectStore:
    """A new bucket, reached through the proxy, of which everything is known."""
    made = connect(bucket, proxy.url)
    made.probe()
    return made


def release(folder: Path, *names: str, size: int = 100) -> Manifest:
    """A release of these files in a new folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    return build_manifest(folder, model="digits", formats={}, signature={}, metrics={})


def file_puts(proxy: FaultProxy) -> list[Request]:
    return [request for request in proxy.sent("PUT", "/releases/") if "MANIFEST" not in request.path]


def sender(request: Request) -> str:
    return QUICK if request.headers["user-agent"].startswith(QUICK) else USUAL


def promises(request: Request) -> dict[str, str]:
    """The headers on which the protocol stands; the values that belong to one moment are left out."""
    chosen = {name: value for name, value in request.headers.items() if re.match("if-|x-amz-(?!date)|content-le", name)}
    for passing in ("x-amz-sdk-checksum-algorithm", "x-amz-security-token"):
        chosen.pop(passing, None)
    return chosen


def test_a_small_file_is_sent_with_what_boto3_sends_and_signed_over_all_of_it(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = release(tmp_path / "release", "file.bin")
    publish(store, tmp_path / "release", manifest)
    (quick,) = file_puts(proxy)
    store.put_new("usual/releases/file.bin", quick.body)
    usual = file_puts(proxy)[-1]
    assert (sender(quick), sender(usual)) == (QUICK, USUAL)
    assert promises(quick) == promises(usual)
    assert quick.headers["if-none-match"] == "*"
    assert quick.headers["x-amz-content-sha256"] == hashlib.sha256(quick.body).hexdigest()
    signed = re.search(r"SignedHeaders=([^,]+)", quick.headers["authorization"])
    assert signed is not None and set(promises(quick)) - {"content-length"} <= set(signed[1].split(";"))
    fetch_release(store, "digits", manifest.release, tmp_path / "copy")


ENCRYPTION = ("x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id")


def test_a_key_of_sse_kms_is_sent_with_small_files_too(
    connect: Connect, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # RGW has no key server and would refuse.
    proxy.add(Rule(StripHeaders(ENCRYPTION), "PUT"))
    monkeypatch.setenv("SHIP_KMS_KEY_ID", "alias/models")
    publish(connect(bucket, proxy.url), tmp_path / "release", release(tmp_path / "release", "file.bin"))
    (sent,) = file_puts(proxy)
    assert sender(sent) == QUICK
    assert [sent.headers[name] for name in ENCRYPTION] == ["aws:kms", "alias/models"]


def test_large_files_and_names_that_need_escapes_are_left_to_boto3(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    release(folder, "large.bin", size=SMALL_BYTES + 1)
    manifest = release(folder, "small.bin", "a folder/with spaces.bin", "plus+and=.bin", "ünïcode.bin")
    publish(store, folder, manifest)
    assert {request.path.rpartition("/")[2] for request in file_puts(proxy) if sender(request) == QUICK} == {
        "small.bin"
    }
    fetch_release(store, "digits", manifest.release, tmp_path / "copy")


def test_a_request_that_failed_is_sent_again_by_boto3(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "release"
    manifest = release(folder, "busy.bin", "lost.bin", "damaged.bin", "well.bin")
    for fault, name in ((Answer(503, "SlowDown"), "busy"), (DropReply(), "lost"), (Damage(), "damaged")):
        proxy.add(Rule(fault, "PUT", f"{name}.bin", times=1))
    assert publish(store, folder, manifest).release == manifest.release
    tried = {name: [sender(request) for request in proxy.sent("PUT", name)] for name in manifest.files}
    assert tried == {name: [QUICK] if name == "well.bin" else [QUICK, USUAL] for name in manifest.files}
    assert not caplog.records
    fetch_release(store, "digits", manifest.release, tmp_path / "copy")


def test_a_file_that_is_there_already_is_not_sent_again(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    manifest = release(folder, "file.bin")
    key = f"models/digits/releases/{manifest.release}/file.bin"

    def somebody_is_faster() -> None:
        store.put_new(key, (folder / "file.bin").read_bytes())

    proxy.add(Rule(PassOn(), "PUT", "file.bin", times=1, before=somebody_is_faster))
    assert publish(store, folder, manifest).sent_bytes == 0
    assert [sender(request) for request in file_puts(proxy)] == [QUICK, USUAL]


def test_another_file_under_its_key_is_refused(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    manifest = release(folder, "file.bin")
    key = f"models/digits/releases/{manifest.release}/file.bin"
    proxy.add(Rule(PassOn(), "PUT", "file.bin", times=1, before=lambda: bool(store.put_new(key, b"x" * 100))))
    with pytest.raises(ReleaseError, match=r"file\.bin: expected SHA-256"):
        publish(store, folder, manifest)


def test_a_way_that_never_succeeds_is_given_up_and_says_so_once(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OnlyBoto3(PassOn):
        def apply(self, request: Request, forward: Forward) -> Reply | None:
            return fault_reply(403, "AccessDenied") if sender(request) == QUICK else forward(request)

    proxy.add(Rule(OnlyBoto3(), "PUT"))
    folder = tmp_path / "release"
    manifest = release(folder, *(f"file{number:03d}.bin" for number in range(100)))
    publish(store, folder, manifest)
    tried = [sender(request) for request in file_puts(proxy)]
    assert tried.count(USUAL) == 100 and MOST_FAILURES <= tried.count(QUICK) < 100
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "by boto3 from now on" in said and "403" in said
    fetch_release(store, "digits", manifest.release, tmp_path / "copy")


def test_a_bucket_that_may_not_be_written_is_explained_as_ever(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.add(Rule(Answer(403, "AccessDenied"), "PUT", "file.bin"))
    folder = tmp_path / "release"
    with pytest.raises(SettingsError, match=r"refused these credentials: cannot write .*file\.bin \(403 AccessDenied"):
        publish(store, folder, release(folder, "file.bin"))


@pytest.mark.parametrize(
    ("variable", "value", "way"),
    [("AWS_SERVER_SIDE_ENCRYPTION", "AES256", "boto3"), ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", "obstore")],
)
def test_a_variable_that_only_one_of_the_two_reads_leaves_everything_to_boto3_or_is_not_followed(
    connect: Connect, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    variable: str, value: str, way: str,
) -> None:  # fmt: skip
    store = connect(bucket, proxy.url)
    monkeypatch.setenv(variable, value)
    publish(store, tmp_path / "release", release(tmp_path / "release", "file.bin"))
    assert [sender(request) for request in file_puts(proxy)] == [{"boto3": USUAL, "obstore": QUICK}[way]]


def test_a_store_that_compares_only_named_checksums_gets_small_files_from_boto3(
    connect: Connect, s3_server: S3Server, tmp_path: Path
) -> None:
    with FaultProxy(s3_server.url) as proxy:
        store = connect(f"named-{uuid.uuid4().hex[:8]}", proxy.url)
        store.create_bucket_if_missing()
        traits = store.probe()
        assert traits.checks_bodies and not traits.checks_unnamed
        publish(store, tmp_path / "release", release(tmp_path / "release", "file.bin"))
        assert [sender(request) for request in file_puts(proxy)] == [USUAL]

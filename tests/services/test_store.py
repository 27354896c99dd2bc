"""What the store has to promise, and what is said when it cannot be reached, on both kinds of server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.errorfactory import ClientExceptionsFactory

from shipreader.bucket import Bucket
from tests.support.fault_proxy import Answer, AnswerAfter, DropReply, Fault, FaultProxy, Rule, StripHeaders
from tests.support.fixture_types import Connect
from tests.support.ports import free_port
from tests.support.releases import CHANNEL, MODEL, make_release
from tests.support.stack_servers import S3Server
from train_and_ship.infra.errors import PreconditionFailedError, ServiceError, SettingsError, StoreRefusedError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer

CONDITIONS = ("if-match", "if-none-match")


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    """Every promise is kept on both kinds of server."""
    return each_store_url


@pytest.fixture(autouse=True)
def tried_once() -> None:
    """Each time here."""


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
    with pytest.raises(StoreRefusedError, match="replaced") as caught:
        publish(store, tmp_path / "release", make_release(tmp_path / "release"))
    assert not caught.value.retryable
    assert store.list_keys("") == {}


def test_a_store_that_checks_conditions_only_most_of_the_time_is_refused(
    connect: Connect, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Rule(StripHeaders(CONDITIONS), "PUT", r"/race", times=2))
    with pytest.raises(StoreRefusedError, match=r"8 PUTs .* had \d winners, not 1"):
        connect(bucket, proxy.url).probe()


def test_a_store_that_does_not_know_a_condition_is_refused(connect: Connect, bucket: str, proxy: FaultProxy) -> None:
    proxy.add(Rule(Answer(501, "NotImplemented"), "PUT", "/conditions"))
    with pytest.raises(StoreRefusedError, match="does not implement If-None-Match"):
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
        read_pointer(Channel(faulty, MODEL, CHANNEL))


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
    monkeypatch.setenv("SHIP_HOME", str(s3_server.folder))
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    store = ObjectStore.from_settings(Settings.load())
    store.create_bucket_if_missing()
    store.create_bucket_if_missing()
    store.check()


def test_an_object_has_another_etag_when_it_changed(object_store: ObjectStore) -> None:
    etag = object_store.put_new("key", b"1")
    assert object_store.get("key") == (b"1", etag)
    newer = object_store.replace("key", b"2", etag)
    assert newer != etag
    assert object_store.get("key") == (b"2", newer)
    assert object_store.get("absent") is None
    assert object_store.head("absent") is None


def test_conditional_writes_say_when_they_did_not_happen(object_store: ObjectStore) -> None:
    etag = object_store.put_new("key", b"1")
    with pytest.raises(PreconditionFailedError):
        object_store.put_new("key", b"2")
    object_store.replace("key", b"2", etag)
    with pytest.raises(PreconditionFailedError):
        object_store.replace("key", b"3", etag)
    with pytest.raises(PreconditionFailedError):
        object_store.replace("absent", b"3", etag)


def test_threads_that_use_a_store_first_at_once_each_find_that_there_is_no_such_key(
    connect: Connect, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ClientExceptionsFactory._create_client_exceptions

    def slowly(factory: ClientExceptionsFactory, model: Any) -> Any:
        made = make(factory, model)
        time.sleep(0.2)
        return made

    monkeypatch.setattr(ClientExceptionsFactory, "_create_client_exceptions", slowly)
    store = connect(bucket)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.get, ["missing"] * 4)) == [None] * 4
        assert list(pool.map(Bucket(s3_client(Settings.load()), bucket).small, ["missing"] * 4, [10] * 4)) == [None] * 4

"""Buckets that keep versions: some stores keep their promises there, and Ceph RGW 16 does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import Answer, FaultProxy, Rule, StripHeaders
from tests.support.fixture_types import Connect
from tests.support.releases import CHANNEL, MODEL, make_release, move, published, rolled_back
from train_and_ship.infra.errors import ServiceError, StoreRefusedError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.store_probe import Versioning
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels import swap
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer

VERSIONING = r"\?versioning"


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    return each_store_url


@pytest.fixture
def on_rgw(request: pytest.FixtureRequest) -> bool:
    return "rgw" in request.node.callspec.params["each_store_url"]


def switch_versioning(store: ObjectStore, status: Any = "Enabled") -> None:
    client = s3_client(Settings.load())
    client.put_bucket_versioning(Bucket=store.bucket, VersioningConfiguration={"Status": status})


def test_a_bucket_says_whether_it_keeps_versions(object_store: ObjectStore) -> None:
    assert object_store.versioning() is Versioning.NEVER
    switch_versioning(object_store)
    assert object_store.versioning() is Versioning.ON
    switch_versioning(object_store, "Suspended")
    assert object_store.versioning() is Versioning.SUSPENDED


def test_a_process_that_found_the_bucket_good_before_versioning_was_switched_on_overwrites_nothing(
    object_store: ObjectStore, on_rgw: bool, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    before = move(object_store, first)
    switch_versioning(object_store)
    key = release_prefix(MODEL, first.release) + "file0.bin"
    stored = object_store.head(key)
    if not on_rgw:
        # The same promises, with versions and without.
        publish(object_store, tmp_path / "third", make_release(tmp_path / "third", seed=2))
        assert move(object_store, second).generation == 2
        return
    # Both promises are broken there: what exists is written over, and what is its own version is refused.
    assert object_store.put_new(".probe/over", b"1") != object_store.put_new(".probe/over", b"2")
    said = (
        rf"a PUT with If-None-Match: \* replaced an existing object.* Versioning of bucket {object_store.bucket}: on\. "
        "Some stores, such as Ceph RGW 16, .* use such a bucket"
    )
    for act in (
        lambda: publish(object_store, tmp_path / "0", first),
        lambda: publish(object_store, tmp_path / "third", make_release(tmp_path / "third", seed=2)),
        lambda: move(object_store, second),
    ):
        with pytest.raises(StoreRefusedError, match=said) as caught:
            act()
        assert not caught.value.retryable
    assert object_store.head(key) == stored
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == before


def test_a_pointer_of_a_time_with_versioning_is_not_said_to_be_moved_by_others(
    object_store: ObjectStore, on_rgw: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    pointer = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert pointer is not None
    switch_versioning(object_store)
    # What a move under versioning left, before the probe knew of it.
    client = s3_client(Settings.load())
    key = f"models/{MODEL}/channels/{CHANNEL}.json"
    client.put_object(Bucket=object_store.bucket, Key=key, Body=replace(pointer, nonce="0" * 32, generation=2).encode())
    switch_versioning(object_store, "Suspended")
    monkeypatch.setattr(swap, "MOVE_CONFLICTS", 3)
    if not on_rgw:
        assert move(object_store, second).generation == 3
        return
    with pytest.raises(StoreRefusedError, match=r"3 times, while nobody moved it\. Versioning of bucket .*: suspended"):
        move(object_store, second)


def test_conditions_that_went_with_versioning_are_missed_before_anything_is_published(
    faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    """As Ceph RGW 16 does it, on any store: after the first probe the conditions are ignored."""
    switch_versioning(faulty)
    proxy.add(Rule(StripHeaders(("if-none-match",))))
    with pytest.raises(StoreRefusedError, match=r"replaced an existing object.* Versioning of bucket .*: on"):
        publish(faulty, tmp_path / "release", make_release(tmp_path / "release"))
    assert faulty.list_keys("models/") == {}


def test_where_versioning_may_not_be_asked_the_conditions_are_tried_each_time(
    faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train_and_ship.infra.objectstore")
    proxy.add(Rule(Answer(403, "AccessDenied"), "GET", VERSIONING))
    manifest = published(faulty, tmp_path / "0")
    assert "versioning is not known; trying the conditional writes again" in caplog.text
    tried = len(proxy.sent("PUT", "/.probe/"))
    move(faulty, manifest)
    assert len(proxy.sent("PUT", "/.probe/")) > tried
    proxy.add(Rule(StripHeaders(("if-none-match",))))
    with pytest.raises(StoreRefusedError, match=r"Versioning of bucket .*: not known.*get-bucket-versioning"):
        publish(faulty, tmp_path / "1", make_release(tmp_path / "1", 1))


def test_a_store_that_does_not_answer_is_no_store_without_versioning(faulty: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Rule(Answer(503, "SlowDown"), "GET", VERSIONING))
    with pytest.raises(ServiceError, match=r"cannot ask for the versioning .* 503"):
        faulty.versioning()


def test_the_question_costs_a_publication_one_request_and_a_rollback_none(
    faulty: ObjectStore, connect: Connect, proxy: FaultProxy, tmp_path: Path
) -> None:
    for seed in range(2):
        move(faulty, published(faulty, tmp_path / str(seed), seed))
    # Two publications and two moves, each by a process that had probed before.
    assert len(proxy.sent("GET", VERSIONING)) == 4
    rolled_back(connect(faulty.bucket, proxy.url))
    assert len(proxy.sent("GET", VERSIONING)) == 4


def test_a_bucket_with_versions_is_tried_again_once_only(
    faulty: ObjectStore, proxy: FaultProxy, on_rgw: bool, tmp_path: Path
) -> None:
    if on_rgw:
        pytest.skip("Ceph RGW 16 is refused")
    switch_versioning(faulty)
    published(faulty, tmp_path / "0")
    tried = len(proxy.sent("PUT", "/.probe/"))
    published(faulty, tmp_path / "1", 1)
    assert len(proxy.sent("PUT", "/.probe/")) == tried

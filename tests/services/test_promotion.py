"""Channels in a real S3 server, also when the network and other promoters get in the way."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import (
    Answer,
    AnswerAfter,
    DropReply,
    DropRequest,
    Fault,
    FaultProxy,
    PassOn,
    Reply,
    Rule,
)
from tests.support.fixture_types import Connect
from tests.support.ports import free_port
from tests.support.releases import CHANNEL, MODEL, POINTER, ignore, move, published
from tests.support.stack_servers import S3Server
from train_and_ship.infra.errors import GateError, ReleaseError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history, record_key
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.swap import Accept
from train_and_ship.registry.release.manifest import Manifest

CONDITIONS = ("if-match", "if-none-match")


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    """Every promise is kept on both kinds of server."""
    return each_store_url


def test_an_unused_channel_has_no_pointer_and_no_history(object_store: ObjectStore) -> None:
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) is None
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == []


def test_every_move_is_recorded(object_store: ObjectStore, tmp_path: Path) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    moves = [move(object_store, manifest, reason=f"move {n}") for n, manifest in enumerate(releases)]
    assert [pointer.generation for pointer in moves] == [1, 2, 3]
    assert [pointer.previous for pointer in moves] == [None, releases[0].release, releases[1].release]
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == moves[-1]
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == moves
    assert moves[2].reason == "move 2" and moves[2].moved_at.endswith("+00:00")


def test_channels_are_independent(object_store: ObjectStore, tmp_path: Path) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    assert move(object_store, second, channel="staging").generation == 1
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == first.release


def test_moving_to_what_is_live_changes_nothing(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    first = move(object_store, manifest)
    again = move(object_store, manifest, reason="again")
    assert again == first and again.etag == first.etag
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == [first]


def test_a_refused_candidate_leaves_the_channel_as_it_was(object_store: ObjectStore, tmp_path: Path) -> None:
    better, worse = published(object_store, tmp_path / "a", 0, 0.98), published(object_store, tmp_path / "b", 1, 0.90)
    live = move(object_store, better)
    with pytest.raises(GateError, match="worse"):
        move(object_store, worse, accept=not_worse_than_live(worse))
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == live
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == [live]


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
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == best.release


def test_a_candidate_still_good_enough_follows_the_other_move(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    candidate, other = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=lambda: ignore(move(object_store, other))))
    pointer = move(faulty, candidate, accept=not_worse_than_live(candidate))
    assert (pointer.generation, pointer.previous) == (2, other.release)
    assert read_history(Channel(object_store, MODEL, CHANNEL))[-1] == pointer


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
    history = read_history(Channel(object_store, MODEL, CHANNEL))
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == pointer == history[-1]
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
    history = read_history(Channel(object_store, MODEL, CHANNEL))
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
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) is None
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
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == [dead]
    proxy.rules.remove(broken)
    after = move(object_store, second)
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == [dead, after]


def test_nothing_is_replaced_whose_record_cannot_be_kept(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    live = move(object_store, first)
    # As its mover leaves it that dies right after moving the pointer.
    object_store.delete(record_key(MODEL, CHANNEL, live.generation))
    proxy.add(Rule(Answer(400, "InvalidRequest"), "PUT", "/history/"))
    with pytest.raises(ServiceError):
        move(faulty, second)
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == live


def test_generations_go_on_after_somebody_deleted_the_pointer(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    object_store.delete(pointer_key(MODEL, CHANNEL))
    assert move(object_store, second).generation == 2
    assert len(read_history(Channel(object_store, MODEL, CHANNEL))) == 2


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
    history = read_history(Channel(object_store, MODEL, CHANNEL))
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
    history = read_history(Channel(object_store, MODEL, CHANNEL))
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
            read_pointer(Channel(store, MODEL, CHANNEL))
        server.start()
        assert read_pointer(Channel(store, MODEL, CHANNEL)) == moves[-1]
        assert read_history(Channel(store, MODEL, CHANNEL)) == moves
        for manifest in releases:
            fetch_release(store, MODEL, manifest.release, tmp_path / f"{manifest.release}-copy")
        assert move(store, releases[0]).generation == 3
    finally:
        server.kill()

"""A promotion that the network, the store or a SIGKILL gets in the way of, at every one of its requests.

`make test` tries some faults at each request on one server, `make soak` every fault at each on two.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.fault_proxy import (
    Answer,
    AnswerAfter,
    AtIndex,
    CutReply,
    CutRequest,
    Damage,
    DamageReply,
    Delay,
    DropReply,
    DropRequest,
    Fault,
    FaultProxy,
    Forward,
    Reply,
    Request,
)
from tests.support.fixture_types import Connect
from tests.support.promoter import PromoterHost, promote
from tests.support.stack_servers import S3Server
from train_and_ship.infra import objectstore, s3
from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.probed import Probed
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history, read_record, record_key
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer, read_pointer
from train_and_ship.registry.release.manifest import Manifest, build_manifest, verify_folder

MODEL, CHANNEL = "digits", "prod"
TIMEOUT_SECONDS = 1.0
FAULTS: dict[str, Fault] = {
    "500": Answer(500, "InternalError"),
    "503": Answer(503, "SlowDown"),
    "409": Answer(409, "ConditionalRequestConflict"),
    "412": Answer(412, "PreconditionFailed"),
    "500 after": AnswerAfter(500, "InternalError"),
    "409 after": AnswerAfter(409, "ConditionalRequestConflict"),
    "request lost": DropRequest(),
    "reply lost": DropReply(),
    "request cut": CutRequest(),
    "reply cut": CutReply(),
    "request damaged": Damage(),
    "reply damaged": DamageReply(),
    "late": Delay(2 * TIMEOUT_SECONDS),
}
GONE = 1_000_000
"""More requests than follow."""


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    return each_store_url


@pytest.fixture(params=["small", pytest.param("in parts", marks=pytest.mark.soak)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the files of a release: the second kind has one that goes up in two parts."""
    # Both stores take small parts: S3's own least is 5 MiB.
    smallest = 2**16
    monkeypatch.setattr(objectstore, "MULTIPART_BYTES", smallest)
    monkeypatch.setattr(objectstore, "PART_BYTES", smallest)
    return [1000, 2000] if request.param == "small" else [smallest + 1000, 2000]


@pytest.fixture
def some(store_url: str, s3_server: S3Server) -> range:
    """Which requests `make test` disturbs: all on one server, every third on the slower one."""
    return range(0, GONE, 1 if store_url == s3_server.url else 3)


@dataclass
class Scene:
    """A channel with a live release, a candidate, and a proxy through which it is promoted."""

    direct: ObjectStore
    connect: Callable[[], ObjectStore]
    """Through the proxy, with nothing known of the store but what an earlier command has kept."""
    stranger: Callable[[], ObjectStore]
    """Through the proxy, with nothing known of the store."""
    proxy: FaultProxy
    folder: Path
    candidates: Iterator[tuple[Path, Manifest]]
    history: list[Pointer] = field(default_factory=list)

    def candidate(self) -> tuple[Path, Manifest]:
        """A release that the bucket has nothing of."""
        return next(self.candidates)

    def copy(self) -> Path:
        return self.folder / uuid.uuid4().hex

    def requests(self, connect: Callable[[], ObjectStore]) -> int:
        """How many requests an undisturbed promotion makes."""
        folder, manifest = self.candidate()
        before = len(self.proxy.requests)
        promote(connect(), folder, manifest, self.copy())
        self.end(manifest)
        return len(self.proxy.requests) - before

    def end(self, manifest: Manifest) -> None:
        """After a promotion that was disturbed: nothing is torn, nothing is lost, and the next try succeeds."""
        self.proxy.settle()
        self.proxy.rules.clear()
        old = self.history[-1] if self.history else None
        live = read_pointer(Channel(self.direct, MODEL, CHANNEL))
        allowed = {manifest.release, old.release if old else None}
        assert (live.release if live else None) in allowed
        for pointer in {pointer.release: pointer for pointer in (old, live) if pointer}.values():
            copy = self.copy()
            found = fetch_release(self.direct, MODEL, pointer.release, copy, manifest_sha256=pointer.manifest_sha256)
            verify_folder(copy, found)
        again = promote(self.direct, self.folder / manifest.release, manifest, self.copy())
        assert live is None or live.release != manifest.release or again == live
        assert again.generation == len(self.history) + 1 and again.previous == (old.release if old else None)
        assert read_pointer(Channel(self.direct, MODEL, CHANNEL)) == again
        if old is not None:
            assert read_record(self.direct, record_key(MODEL, CHANNEL, old.generation)) == old
        self.history.append(again)


@pytest.fixture
def scene(
    connect: Connect, object_store: ObjectStore, store_url: str, sizes: list[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scene]:  # fmt: skip
    generator = random.Random(0)
    # Read when a client is made.
    direct = connect(object_store.bucket)
    monkeypatch.setattr(s3, "READ_SECONDS", TIMEOUT_SECONDS)

    def candidates() -> Iterator[tuple[Path, Manifest]]:
        while True:
            draft = tmp_path / "draft"
            draft.mkdir()
            for index, size in enumerate(sizes):
                (draft / f"file{index}.bin").write_bytes(generator.randbytes(size))
            manifest = build_manifest(draft, model=MODEL, formats={}, signature={}, metrics={"accuracy": 0.9})
            yield draft.rename(tmp_path / manifest.release), manifest

    with FaultProxy(store_url) as proxy:
        direct.probe()
        bucket = object_store.bucket
        connection = connect(bucket, proxy.url)._connection
        # A client costs a tenth of a second to make; what is known of the store belongs to the ObjectStore.
        stranger = anew = functools.partial(ObjectStore, connection, bucket=bucket, address=proxy.url)
        if sizes[0] > objectstore.MULTIPART_BYTES:
            # As a second command on this machine: what the store is like was found out by the first. Without that, half
            # of the requests are those that find out, which the small releases have disturbed.
            anew = functools.partial(anew, probed=Probed(tmp_path / "probed", proxy.url, bucket))
            anew().probe()
        scene = Scene(direct, anew, stranger, proxy, tmp_path, candidates())
        yield scene
        assert read_history(Channel(direct, MODEL, CHANNEL)) == scene.history


def disturbed(scene: Scene, index: int, fault: Fault, following: int = 0) -> str:
    """Promote with the fault at that request, and check; returns how the promotion ended."""
    folder, manifest = scene.candidate()
    scene.proxy.add(AtIndex(fault, index=index, following=following))
    outcome = ""
    try:
        pointer = promote(scene.connect(), folder, manifest, scene.copy())
    except ShipError as error:
        # Anything else would be a mistake of ours.
        outcome = str(error)
    else:
        live = read_pointer(Channel(scene.direct, MODEL, CHANNEL))
        assert live == pointer and live.release == manifest.release
    scene.end(manifest)
    return outcome


def test_some_fault_at_every_request_leaves_the_old_or_the_new_release_live(scene: Scene, some: range) -> None:
    kinds = [name for name in FAULTS if name != "late"]
    count = scene.requests(scene.connect)
    for index in some[:count]:
        disturbed(scene, index, FAULTS[kinds[index % len(kinds)]])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_at_every_request_leaves_the_old_or_the_new_release_live(scene: Scene, kind: str) -> None:
    failed = {}
    count = scene.requests(scene.connect)
    for index in range(count):
        if outcome := disturbed(scene, index, FAULTS[kind]):
            failed[index] = outcome
    print(f"{kind}: {len(failed)} of {count} promotions gave up: {failed}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["500", "request lost", "reply lost"])
def test_a_store_that_is_gone_from_any_request_on_leaves_the_old_or_the_new_release_live(
    scene: Scene, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    for index in range(scene.requests(scene.connect)):
        disturbed(scene, index, FAULTS[kind], following=GONE)


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the client, before its request happens or after."""

    kill: Callable[[], None]
    after: bool

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        if self.after:
            forward(request)
        self.kill()
        return None


def kill_at(scene: Scene, host: PromoterHost, index: int, after: bool) -> None:
    folder, manifest = scene.candidate()
    description = scene.folder / "manifest"
    description.write_bytes(manifest.encode())
    started: list[int] = []
    known = threading.Event()

    def kill() -> None:
        known.wait()
        os.kill(started[0], signal.SIGKILL)

    rule = scene.proxy.add(AtIndex(Kill(kill, after), index=index))
    started.append(host.start(folder, description, scene.copy()))
    known.set()
    status, error = host.wait()
    # Racing requests differ in number: the last index may not come.
    assert status == -signal.SIGKILL or rule.used == 0, error
    scene.end(manifest)


def test_a_promoter_killed_at_any_request_leaves_the_old_or_the_new_release_live(scene: Scene, some: range) -> None:
    count = scene.requests(scene.stranger)
    with PromoterHost() as host:
        for index in some[:count]:
            kill_at(scene, host, index, after=index % 2 == 1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("after", [False, True], ids=["before it happens", "after it happened"])
def test_a_promoter_killed_before_or_after_any_request_leaves_the_old_or_the_new_release_live(
    scene: Scene, after: bool
) -> None:
    count = scene.requests(scene.stranger)
    with PromoterHost() as host:
        for index in range(count):
            kill_at(scene, host, index, after)


PROMOTERS, READERS = 32, 8


@pytest.mark.soak
def test_32_promoters_and_8_readers_at_once_see_every_generation_once_and_never_a_torn_release(
    connect: Connect, object_store: ObjectStore, tmp_path: Path
) -> None:
    bucket = object_store.bucket
    # Everybody has connections of his own.
    stores = [connect(bucket) for _ in range(PROMOTERS + READERS)]
    for store in stores:
        store._traits = object_store.probe()
    candidates = []
    for number in range(PROMOTERS):
        folder = tmp_path / f"candidate{number}"
        folder.mkdir()
        for index in range(2):
            (folder / f"file{index}.bin").write_bytes(random.Random(2 * number + index).randbytes(1000))
        candidates.append((folder, build_manifest(folder, model=MODEL, formats={}, signature={}, metrics={})))
    start, over = threading.Barrier(PROMOTERS + READERS), threading.Event()

    def promoter(number: int) -> Pointer:
        start.wait()
        folder, manifest = candidates[number]
        return promote(stores[number], folder, manifest, tmp_path / f"copy{number}")

    def reader(number: int) -> list[int]:
        store, seen, etag, key = stores[PROMOTERS + number], [0], "", pointer_key(MODEL, CHANNEL)
        start.wait()
        while True:
            last = over.is_set()
            found = store.get(key)
            if found is not None and found[1] != etag:
                pointer, etag = decode_pointer(found[0], CHANNEL), found[1]
                assert pointer.generation > seen[-1]
                seen.append(pointer.generation)
                copy = tmp_path / f"reader{number}" / pointer.release
                manifest = fetch_release(store, MODEL, pointer.release, copy, manifest_sha256=pointer.manifest_sha256)
                verify_folder(copy, manifest)
            if last:
                return seen

    with ThreadPoolExecutor(PROMOTERS + READERS) as pool:
        readers = [pool.submit(reader, number) for number in range(READERS)]
        try:
            moves = list(pool.map(promoter, range(PROMOTERS)))
        finally:
            over.set()
        seen = [done.result() for done in readers]
    assert sorted(pointer.generation for pointer in moves) == list(range(1, PROMOTERS + 1))
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == sorted(moves, key=lambda pointer: pointer.generation)
    assert all(generations[-1] == PROMOTERS for generations in seen)

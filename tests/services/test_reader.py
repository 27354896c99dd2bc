"""A serving machine that follows a channel in a real S3 server, also when the bucket is down or holds something bad."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.objectstore import ObjectStore
from infra.s3 import s3_client
from infra.settings import Settings
from registry.keys import pointer_key, release_prefix
from registry.pointer import Pointer
from registry.release import MANIFEST, Manifest, canonical_json
from shipreader import bucket as reader_bucket
from shipreader.errors import ReaderError, Refused, Unavailable
from shipreader.reader import Reader
from shipreader.records import Release
from tests.services.conftest import Connect, S3Server, free_port
from tests.services.fault_proxy import (
    Answer,
    CutReply,
    DropReply,
    DropRequest,
    Fault,
    FaultProxy,
    Forward,
    Reply,
    Request,
    Rule,
)
from tests.services.releases import CHANNEL, MODEL, make_release, move, published

MakeReader = Callable[..., Reader]


@pytest.fixture
def make_reader(object_store: ObjectStore, connect: Connect, proxy: FaultProxy, tmp_path: Path) -> MakeReader:
    """A reader of the same bucket as `object_store`, through the proxy."""
    connect(object_store.bucket, proxy.url)
    client = s3_client(Settings.load())

    def make(folder: Path = tmp_path / "served", **options: Any) -> Reader:
        chosen = {"interval": 0.05, **options}
        return Reader(MODEL, bucket=object_store.bucket, folder=folder, channel=CHANNEL, client=client, **chosen)

    return make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def served(reader: Reader) -> Release:
    assert reader.current is not None
    return reader.current


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def replace_object(store: ObjectStore, key: str, body: bytes) -> None:
    stored = store.head(key)
    assert stored is not None
    store.replace(key, body, stored.etag)


@dataclass(frozen=True)
class Other(Fault):
    """Other bytes than the object's."""

    body: bytes
    encoding: str = "identity"

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        size = str(len(self.body))
        return Reply(200, [("ETag", '"1"'), ("Content-Encoding", self.encoding), ("Content-Length", size)], self.body)


def put_pointer(store: ObjectStore, pointer: Pointer) -> None:
    key = pointer_key(MODEL, CHANNEL)
    if store.head(key) is None:
        store.put_new(key, pointer.encode())
    else:
        replace_object(store, key, pointer.encode())


# ---- once


def test_what_is_live_is_pulled_and_becomes_current(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    pointer = move(object_store, manifest)
    release = make_reader().pull()
    assert (release.id, release.generation) == (manifest.release, 1)
    assert release.moved_at == pointer.moved_at
    current = tmp_path / "served" / "current"
    assert current.is_symlink() and current.resolve() == release.folder
    assert content(current) == content(tmp_path / "release")
    assert (current / MANIFEST).read_bytes() == manifest.encode()
    assert release.artifact("onnx").read_bytes() == (tmp_path / "release" / "file0.bin").read_bytes()
    with pytest.raises(ReaderError, match="expected one of onnx; got 'pt2'"):
        release.artifact("pt2")


def test_an_unchanged_channel_costs_one_conditional_get(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    reader = make_reader()
    reader.pull()
    before = len(proxy.requests)
    reader.pull()
    # A new process on the same folder too.
    make_reader().pull()
    again = proxy.requests[before:]
    assert [request.method for request in again] == ["GET", "GET"]
    assert all("/channels/" in request.path and "if-none-match" in request.headers for request in again)


def test_a_reader_never_lists(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    make_reader().pull()
    # The pointer, the manifest, each file.
    assert len(proxy.requests) == 2 + len(manifest.files)
    assert all(request.method == "GET" and "list-type" not in request.path for request in proxy.requests)


def test_a_release_that_is_here_is_not_downloaded_again(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    reader = make_reader()
    for manifest in (first, second):
        move(object_store, manifest)
        reader.pull()
    before = len(proxy.sent("GET", "/file"))
    # A rollback: an older release under a higher generation.
    move(object_store, first)
    release = reader.pull()
    assert (release.id, release.generation) == (first.release, 3)
    assert len(proxy.sent("GET", "/file")) == before


def test_the_last_two_releases_stay_on_disk(object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path) -> None:
    reader = make_reader()
    seen = []
    for seed in range(4):
        move(object_store, published(object_store, tmp_path / str(seed), seed))
        seen.append(reader.pull().id)
        kept = {path.name for path in (tmp_path / "served" / "releases").iterdir()}
        assert kept == set(seen[-2:])


def test_an_unused_channel_is_named(make_reader: MakeReader) -> None:
    with pytest.raises(Unavailable, match="nothing is live on prod"):
        make_reader().pull()


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b"])
def test_names_that_cannot_be_part_of_a_key_are_refused(name: str, tmp_path: Path) -> None:
    for model, channel in ((name, "prod"), ("digits", name)):
        with pytest.raises(ReaderError, match="name: expected"):
            Reader(model, bucket="models", folder=tmp_path, channel=channel, client=object())


def test_the_folder_of_another_channel_is_not_taken_over(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    make_reader().pull()
    other = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "served", channel="staging", client=object())
    with pytest.raises(ReaderError, match=r"expected the folder of .* digits staging, got that of .* digits prod"):
        other.pull()


def test_a_folder_with_a_current_of_its_own_is_left_alone(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    (tmp_path / "served" / "current").mkdir(parents=True)
    with pytest.raises(ReaderError, match="expected a link made by a reader"):
        make_reader().pull()


# ---- what is bad stays out


def test_an_altered_file_is_refused_and_the_last_good_release_stays(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    reader = make_reader()
    good = reader.pull()
    move(object_store, second)
    key = release_prefix(MODEL, second.release) + "file1.bin"
    for body, reason in (
        (b"x" * 1001, "expected SHA-256"),
        (b"x", "expected 1,001 bytes, got 1"),
        (b"x" * 9999, "more"),
    ):
        replace_object(object_store, key, body)
        with pytest.raises(Refused, match=reason):
            reader.pull()
        assert reader.current == good and good.id in reader.status().release.folder.name  # type: ignore[union-attr]
        assert reason in reader.status().problem
        assert (tmp_path / "served" / "current").resolve() == good.folder
        assert {path.name for path in (tmp_path / "served" / "releases").iterdir()} == {good.id}
    replace_object(object_store, key, (tmp_path / "1" / "file1.bin").read_bytes())
    assert reader.pull().id == second.release and reader.status().problem == ""


def test_a_file_that_is_longer_than_the_manifest_says_is_not_downloaded_to_its_end(
    object_store: ObjectStore, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reader_bucket, "PIECE_BYTES", 100)
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    replace_object(object_store, release_prefix(MODEL, manifest.release) + "file0.bin", b"x" * 10**7)
    written: list[int] = []

    class Watched(Reader):
        def _download(self, prefix: str, draft: Path, files: Any) -> None:
            try:
                super()._download(prefix, draft, files)
            finally:
                written.append((draft / "file0.bin").stat().st_size)

    made = make_reader()
    made.__class__ = Watched
    with pytest.raises(Refused, match="got more"):
        made.pull()
    assert written == [1000]


def test_a_compressed_object_is_not_unpacked(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    proxy.add(Rule(Other(gzip.compress(bytes(10**7)), "gzip"), "GET", "/file0.bin"))
    with pytest.raises(Refused, match=r"file0\.bin: expected 1,000 bytes, got more"):
        make_reader().pull()


def test_a_release_larger_than_allowed_or_than_the_disk_is_refused_before_it_is_downloaded(
    object_store: ObjectStore,
    make_reader: MakeReader,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    with pytest.raises(Refused, match=f"expected at most 4,005 bytes, got {manifest.total_bytes:,}"):
        make_reader(max_bytes=4005).pull()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Refused, match=r"expected room for 4,006 bytes .* got 100"):
        make_reader().pull()
    assert proxy.sent("GET", "/file") == []


def foreign(store: ObjectStore, manifest: Manifest, files: dict[str, Any]) -> None:
    """Make a release live whose manifest nobody checked: as an intruder with the right to write would."""
    document = {**json.loads(manifest.encode()), "files": files, "formats": {}}
    table = canonical_json(files)
    document["release"] = hashlib.sha256(table).hexdigest()[:20]
    encoded = canonical_json(document)
    store.put_new(release_prefix(MODEL, document["release"]) + MANIFEST, encoded)
    put_pointer(
        store,
        Pointer(
            model=MODEL, channel=CHANNEL, generation=9, release=document["release"], previous=None, nonce="n",
            manifest_sha256=hashlib.sha256(encoded).hexdigest(), moved_at="", moved_by="", reason="", flow_run="",
            mlflow_version="",
        ),
    )  # fmt: skip


ENTRY = {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", "bytes": 1}
"""Of the file `x`."""


def test_a_manifest_that_would_leave_the_folder_is_refused(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    for name in ("../escaped", "/tmp/escaped"):
        foreign(object_store, manifest, {name: ENTRY})
        with pytest.raises(Refused, match="relative path"):
            make_reader().pull()
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/escaped").exists()
    assert not (tmp_path / "served" / "current").exists()
    assert not proxy.sent("GET", "escaped")


def test_a_damaged_pointer_is_refused_and_the_last_good_release_stays(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    reader = make_reader()
    good = reader.pull()
    for body in (b"", b'{"format":2}', b"[" * 100_000, b"x" * 2**21):
        replace_object(object_store, pointer_key(MODEL, CHANNEL), body)
        with pytest.raises(Refused, match=r"channels/prod\.json: expected"):
            reader.pull()
        assert reader.current == good


def test_an_altered_manifest_is_refused(object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    better = canonical_json({**json.loads(manifest.encode()), "metrics": {"accuracy": 1.0}})
    replace_object(object_store, release_prefix(MODEL, manifest.release) + MANIFEST, better)
    with pytest.raises(Refused, match="altered after it went live"):
        make_reader().pull()


def test_a_bucket_that_went_back_in_time_is_not_followed(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    moves = [move(object_store, manifest) for manifest in releases[:2]]
    reader = make_reader()
    held = reader.pull()
    # A backup is restored: the pointer is the one of yesterday.
    put_pointer(object_store, moves[0])
    for same in (reader, make_reader()):
        with pytest.raises(Refused, match="expected generation 2 or later, got another 1: the bucket went back"):
            same.pull()
        assert same.current == held
    # Another move got the number that we know.
    forked = Pointer(**{**vars(moves[1]), "release": releases[2].release, "nonce": "other"})
    put_pointer(object_store, forked)
    with pytest.raises(Refused, match="got another 2"):
        reader.pull()
    # A move that follows is followed.
    put_pointer(object_store, Pointer(**{**vars(moves[0]), "generation": 3, "nonce": "later"}))
    assert (reader.pull().id, reader.pull().generation) == (releases[0].release, 3)


def test_files_altered_on_disk_are_found_at_the_next_start_and_fetched_again(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    folder = make_reader().pull().folder
    for damage in (
        lambda: (folder / "file0.bin").write_bytes(b"x"),
        lambda: (folder / "file0.bin").unlink(),
        lambda: (folder / "more").write_bytes(b"x"),
        lambda: (folder / "link").symlink_to("/etc/passwd"),
        lambda: (folder / MANIFEST).write_bytes(b"{}"),
    ):
        damage()
        assert make_reader().pull().id == manifest.release
        assert content(folder) == content(tmp_path / "release")


def test_what_the_server_does_not_accept_does_not_become_current(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))

    def accept(release: Release) -> None:
        assert release.folder.is_dir()
        if release.id == second.release:
            raise RuntimeError("this runtime is too old for it")

    reader = make_reader(accept=accept)
    move(object_store, first)
    reader.pull()
    move(object_store, second)
    with pytest.raises(Refused, match="was not accepted: RuntimeError: this runtime is too old"):
        reader.pull()
    assert reader.current is not None and reader.current.id == first.release


# ---- in the background


def test_a_follower_is_told_of_every_move_it_sees(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    move(object_store, releases[0])
    seen: list[Release] = []
    with make_reader(on_change=seen.append) as reader:
        for count, manifest in enumerate(releases, 1):
            move(object_store, manifest)
            until(lambda count=count: len(seen) == count)  # type: ignore[misc]
            assert reader.current == seen[-1]
    assert [release.id for release in seen] == [manifest.release for manifest in releases]
    assert [release.generation for release in seen] == [1, 2, 3]
    assert not any(thread.name.startswith("shipreader-") for thread in threading.enumerate())


def test_a_follower_serves_on_while_the_bucket_is_down_and_says_so_once(
    connect: Connect, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = S3Server(tmp_path_factory.mktemp("down"), free_port())
    server.start()
    try:
        store = connect("models", server.url)
        store.create_bucket_if_missing()
        first, second = (published(store, tmp_path / str(seed), seed) for seed in range(2))
        move(store, first)
        client = s3_client(Settings.load())
        options: dict[str, Any] = {"bucket": "models", "folder": tmp_path / "served", "client": client}
        with Reader(MODEL, interval=0.02, **options) as reader:
            server.kill()
            until(lambda: "no answer" in reader.status().problem)
            checked = reader.status().checked_at
            until(lambda: caplog.text.count("still serving release") == 1)
            assert reader.current is not None and reader.current.id == first.release
            assert (tmp_path / "served" / "current" / "file0.bin").is_file()
            # A machine that restarts meanwhile serves what it has.
            with Reader(MODEL, interval=10, **options) as restarted:
                assert restarted.current == reader.current
                assert "kept from before" in caplog.text
            server.start()
            move(store, second)
            until(lambda: reader.current is not None and reader.current.id == second.release)
            assert reader.status().problem == "" and checked != reader.status().checked_at
        assert "following the channel again" in caplog.text
    finally:
        server.kill()


def test_a_new_machine_without_a_bucket_says_so(connect: Connect, tmp_path: Path) -> None:
    connect("models", f"http://127.0.0.1:{free_port()}")
    reader = Reader(MODEL, bucket="models", folder=tmp_path, client=s3_client(Settings.load()))
    with pytest.raises(Unavailable, match="no answer"):
        reader.start()


def test_a_bad_release_is_not_downloaded_again_at_every_look_but_the_next_move_is_followed_at_once(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, bad, good = (published(object_store, tmp_path / str(seed), seed) for seed in range(3))
    move(object_store, first)
    proxy.add(Rule(Other(b"x" * 1003), "GET", f"{bad.release}/file3"))
    with make_reader(interval=0.2, jitter=0) as reader:
        move(object_store, bad)
        until(lambda: "SHA-256" in reader.status().problem)
        looks, downloads = len(proxy.sent("GET", "/channels/")), len(proxy.sent("GET", "/file3"))
        until(lambda: len(proxy.sent("GET", "/channels/")) >= looks + 12)
        # Pauses of 2, 4, 8… intervals.
        assert 1 <= len(proxy.sent("GET", "/file3")) - downloads < 6
        assert reader.current is not None and reader.current.id == first.release
        move(object_store, good)
        until(lambda: reader.current is not None and reader.current.id == good.release)


def test_a_callback_that_fails_does_not_end_the_following(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    move(object_store, releases[0])
    seen: list[str] = []

    def on_change(release: Release) -> None:
        seen.append(release.id)
        if len(seen) == 2:
            raise RuntimeError("no room on the GPU")

    with make_reader(on_change=on_change):
        for count, manifest in enumerate(releases, 1):
            move(object_store, manifest)
            until(lambda count=count: len(seen) == count)  # type: ignore[misc]
    assert "on_change failed" in caplog.text and "no room on the GPU" in caplog.text


def test_single_faults_are_got_over(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    for fault in (DropReply(), DropRequest(), Answer(503, "SlowDown"), Answer(500, "InternalError")):
        proxy.rules.clear()
        proxy.add(Rule(fault, "GET", "/channels/", times=1))
        proxy.add(Rule(fault, "GET", MANIFEST, times=1))
        proxy.add(Rule(fault, "GET", "/file2", times=2))
        assert make_reader(tmp_path / str(fault)).pull().id == manifest.release


def test_a_download_that_breaks_off_goes_on_from_there(
    object_store: ObjectStore,
    make_reader: MakeReader,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(reader_bucket, "PIECE_BYTES", 100)
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)

    proxy.add(Rule(CutReply(), "GET", "/file0.bin", times=2))
    assert make_reader().pull().id == manifest.release
    # In pieces of 100: what is left of the last one is asked for again.
    starts = [request.headers.get("range") for request in proxy.sent("GET", "/file0.bin")]
    assert starts[:2] == [None, "bytes=500-"] and len(starts) == 3 and starts[2] in ("bytes=700-", "bytes=750-")


def test_many_readers_share_a_folder_and_never_see_a_torn_release(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(4)]
    expected = {manifest.release: content(tmp_path / str(seed)) for seed, manifest in enumerate(releases)}
    move(object_store, releases[0])
    make_reader().pull()
    stopping = threading.Event()
    readers: list[Reader] = []

    def serve(_: int) -> int:
        looks = 0
        with make_reader(interval=0.01) as reader:
            readers.append(reader)
            before = 0
            while not stopping.is_set():
                release = reader.current
                assert release is not None and release.generation >= before
                before = release.generation
                with_link = (tmp_path / "served" / "current").resolve()
                try:
                    assert content(with_link) == expected[with_link.name]
                except FileNotFoundError:
                    # Two moves since the link was read: only the last two releases are kept.
                    continue
                looks += 1
        return looks

    with ThreadPoolExecutor(4) as pool:
        serving = [pool.submit(serve, number) for number in range(4)]
        for turn in range(12):
            move(object_store, releases[(turn + 1) % 4])
            time.sleep(0.05)
        try:
            until(lambda: len(readers) == 4 and all(served(reader).generation == 13 for reader in readers))
        finally:
            stopping.set()
        assert all(job.result() > 0 for job in serving)


READER = """
import sys
from pathlib import Path
from shipreader.bucket import s3_client
from shipreader.reader import Reader
Reader("digits", bucket=sys.argv[1], folder=sys.argv[2], client=s3_client()).pull()
"""


def test_a_reader_killed_in_the_middle_leaves_the_last_good_release_and_no_rubbish(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    good = make_reader().pull()
    move(object_store, second)
    started = threading.Event()
    process: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        started.wait()
        process[0].kill()

    proxy.add(Rule(DropRequest(), "GET", "/file1", before=kill, times=1))
    argv = [sys.executable, "-c", READER, object_store.bucket, str(tmp_path / "served")]
    process.append(subprocess.Popen(argv, cwd=Path(__file__).parent.parent.parent, env=os.environ.copy()))
    started.set()
    assert process[0].wait(timeout=60) == -9
    assert (tmp_path / "served" / "current").resolve() == good.folder
    assert content(good.folder) == content(tmp_path / "0")
    assert make_reader().pull().id == second.release
    assert not [path for path in (tmp_path / "served").rglob(".draft*")]


# ---- as a serving machine has it


def test_the_reader_installs_alone_and_its_command_follows_a_channel(
    object_store: ObjectStore, connect: Connect, store_url: str, tmp_path: Path
) -> None:
    source = Path(__file__).parent.parent.parent / "shipreader"
    # A copy: building in place leaves a build folder behind.
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "installed"
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--target", str(target), str(tmp_path / "source")], check=True)
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    folder = tmp_path / "served"
    argv = [sys.executable, "-m", "shipreader", MODEL, "--to", str(folder), "--follow", "--interval", "0.05"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"digits prod: generation 1, {first.release} -> {folder}/current\n"
        move(object_store, second)
        assert process.stdout.readline() == f"digits prod: generation 2, {second.release} -> {folder}/current\n"
    finally:
        process.terminate()
    assert process.wait(timeout=20) == 0
    script = (
        "import sys, shipreader.reader, shipreader.__main__, shipreader.signatures\n"
        "print(shipreader.__file__, {'torch', 'prefect', 'mlflow', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{target / 'shipreader' / '__init__.py'} set()"


@pytest.fixture(autouse=True)
def log_of_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shipreader")

"""A serving machine pulls what is live from a real S3 server, and refuses what is bad."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shipreader import bucket as reader_bucket
from shipreader.errors import ReaderError, RefusedError, UnavailableError
from shipreader.reader import Reader
from shipreader.records import Release
from shipreader.releases import Releases
from tests.support.fault_proxy import FaultProxy, OtherBytes, Rule
from tests.support.fixture_types import MakeReader
from tests.support.releases import CHANNEL, MODEL, content, make_release, move, published, replace_object
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.release.manifest import MANIFEST, Manifest


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
    with pytest.raises(UnavailableError, match="nothing is live on prod"):
        make_reader().pull()


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b"])
def test_names_that_cannot_be_part_of_a_key_are_refused(name: str, tmp_path: Path) -> None:
    for model, channel in ((name, "prod"), ("digits", name)):
        with pytest.raises(ReaderError, match="name: expected"):
            Reader(model, bucket="models", folder=tmp_path, channel=channel, client=reader_bucket.s3_client())


def test_the_folder_of_another_channel_is_not_taken_over(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    make_reader().pull()
    other = Reader(
        MODEL,
        bucket=object_store.bucket,
        folder=tmp_path / "served",
        channel="staging",
        client=reader_bucket.s3_client(),
    )
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
        with pytest.raises(RefusedError, match=reason):
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

    class Watched(Releases):
        def _download(self, prefix: str, draft: Path, *rest: Any) -> None:
            try:
                super()._download(prefix, draft, *rest)
            finally:
                written.append((draft / "file0.bin").stat().st_size)

    made = make_reader()
    made._releases.__class__ = Watched
    with pytest.raises(RefusedError, match="got more"):
        made.pull()
    assert written == [1000]


def test_a_compressed_object_is_not_unpacked(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    proxy.add(Rule(OtherBytes(gzip.compress(bytes(10**7)), "gzip"), "GET", "/file0.bin"))
    with pytest.raises(RefusedError, match=r"file0\.bin: expected 1,000 bytes, got more"):
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
    with pytest.raises(RefusedError, match="expected at most 20,389 bytes on the disk, got 20,390"):
        make_reader(max_bytes=4006 + 4 * 4096 - 1).pull()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RefusedError, match=r"expected room for 20,390 bytes .* got 100"):
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
        with pytest.raises(RefusedError, match="relative path"):
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
        with pytest.raises(RefusedError, match=r"channels/prod\.json: expected"):
            reader.pull()
        assert reader.current == good


def test_an_altered_manifest_is_refused(object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    better = canonical_json({**json.loads(manifest.encode()), "metrics": {"accuracy": 1.0}})
    replace_object(object_store, release_prefix(MODEL, manifest.release) + MANIFEST, better)
    with pytest.raises(RefusedError, match="altered after it went live"):
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
        with pytest.raises(RefusedError, match="expected generation 2 or later, got another 1: the bucket went back"):
            same.pull()
        assert same.current == held
    # Another move got the number that we know.
    forked = Pointer(**{**vars(moves[1]), "release": releases[2].release, "nonce": "other"})
    put_pointer(object_store, forked)
    with pytest.raises(RefusedError, match="got another 2"):
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
    with pytest.raises(RefusedError, match="was not accepted: RuntimeError: this runtime is too old"):
        reader.pull()
    assert reader.current is not None and reader.current.id == first.release

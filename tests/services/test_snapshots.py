"""Snapshots of data, in a folder and in a real store."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from tests.support.fixture_types import Ship
from train_and_ship.infra.errors import JobError, ReleaseError, RequestError
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.data.snapshots import SNAPSHOT, bring_snapshot, identify, publish_snapshot, take
from train_and_ship.registry.job.data import Snapshot


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "2026-11").mkdir(parents=True)
    (folder / "labels.csv").write_text("a,1\n")
    (folder / "2026-11" / "images.bin").write_bytes(bytes(range(256)))
    return folder


def nowhere(bucket: str) -> ObjectStore:
    raise AssertionError("a folder needs no store")


def refused(folder: Path, words: str, **pinned: str) -> None:
    with pytest.raises(JobError, match=words):
        bring_snapshot(Snapshot(path=str(folder), **pinned), folder, nowhere, folder, folder.parent / "home")


def test_a_folder_is_known_by_its_manifest_and_verified_by_hash(data: Path, tmp_path: Path) -> None:
    taken = take(data)
    assert set(taken.files) == {"labels.csv", "2026-11/images.bin"}
    assert take(data) == taken
    pinned = Snapshot(path="data", sha256=taken.sha256)
    assert identify(pinned, tmp_path, nowhere, tmp_path / "home").sha256 == taken.sha256
    assert bring_snapshot(pinned, tmp_path, nowhere, tmp_path, tmp_path / "home") == (data, taken)


def test_what_is_not_as_the_manifest_says_is_refused_with_the_file(data: Path) -> None:
    refused(data, r"expected .*SNAPSHOT.json, found none; `ship snapshot FOLDER` writes it")
    take(data)
    refused(data, r"expected SHA-256 0000.*, as the job file says, got .*: it is another snapshot", sha256="0" * 64)
    (data / "labels.csv").write_text("b,2\n")
    refused(data, r"labels.csv: expected SHA-256 \w+, got \w+; the data is not what its manifest says")
    (data / "labels.csv").write_text("a,1\nb,2\n")
    refused(data, r"says labels.csv: 4 bytes, and there is 8 bytes")
    take(data)
    (data / "more.csv").write_text("c")
    # Even where nothing is read: a new file must not look like no change.
    with pytest.raises(JobError, match=r"says more.csv: no such file, and there is 1 bytes"):
        identify(Snapshot(path=str(data)), data, nowhere, data.parent / "home")
    (data / SNAPSHOT).write_text("{}")
    refused(data, "expected the manifest of a snapshot")


def test_a_file_altered_at_the_same_size_does_not_look_like_no_change(data: Path, tmp_path: Path) -> None:
    home, about = tmp_path / "home", Snapshot(path=str(data))
    take(data)
    assert identify(about, data, nowhere, home) == bring_snapshot(about, data, nowhere, data, home)[1]
    before = (data / "labels.csv").stat()
    (data / "labels.csv").write_text("a,0\n")
    # As a copy with its times kept would leave it.
    os.utime(data / "labels.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(JobError, match=r"labels.csv: expected SHA-256 \w+, got \w+; the data is not what its manifest"):
        identify(about, data, nowhere, home)
    (data / "labels.csv").write_text("a,1\n")
    assert identify(about, data, nowhere, home) == take(data)


def test_files_of_a_snapshot_that_nobody_touched_are_read_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_and_ship.infra.file_hashes.SETTLED_SECONDS", 0.01)
    home, about = tmp_path / "home", Snapshot(path=str(data))
    taken = take(data)
    time.sleep(0.05)
    # Before a training.
    bring_snapshot(about, data, nowhere, data, home)
    monkeypatch.setattr(FileHashes, "fresh", lambda hashes, path: pytest.fail(f"{path} is read again"))
    assert identify(about, data, nowhere, home) == taken


def test_an_object_replaced_at_the_same_size_does_not_look_like_no_change(
    data: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, home = f"data/{uuid.uuid4().hex}/", tmp_path / "home"
    taken = take(data)
    publish_snapshot(data, taken, store, prefix)
    about = Snapshot(path=f"s3://{store.bucket}/{prefix}")
    assert identify(about, tmp_path, lambda bucket: store, home) == taken
    with monkeypatch.context() as known:
        known.setattr(ObjectStore, "head", lambda *_: pytest.fail("asked again"))
        known.setattr(ObjectStore, "hash", lambda *_: pytest.fail("read again"))
        assert identify(about, tmp_path, lambda bucket: store, home) == taken
    found = store.head(prefix + "labels.csv")
    assert found is not None
    store.replace(prefix + "labels.csv", b"a,0\n", found.etag)
    with pytest.raises(JobError, match=r"labels.csv: expected SHA-256 \w+, got \w+; the data is not what its manifest"):
        identify(about, tmp_path, lambda bucket: store, home)


def test_a_manifest_cannot_reach_outside_its_folder(data: Path) -> None:
    take(data)
    (data / SNAPSHOT).write_text((data / SNAPSHOT).read_text().replace("labels.csv", "../labels.csv"))
    refused(data, "expected a relative path")


def test_links_and_empty_folders_are_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected at least one file"):
        take(tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(ReleaseError, match="a symbolic link"):
        take(tmp_path)


def test_a_snapshot_in_a_bucket_grows_and_only_what_is_new_moves(
    data: Path, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    prefix = f"data/{uuid.uuid4().hex}/"
    first = take(data)
    assert publish_snapshot(data, first, store, prefix) == first.total_bytes
    assert publish_snapshot(data, first, store, prefix) == 0
    there = Snapshot(path=f"s3://{store.bucket}/{prefix.rstrip('/')}")
    folder, contents = bring_snapshot(there, tmp_path, lambda bucket: store, tmp_path / "cache", tmp_path / "home")
    assert contents == first and (folder / "2026-11" / "images.bin").read_bytes() == bytes(range(256))

    # A copy that rotted is fetched again.
    (folder / "labels.csv").write_text("x,9\n")
    again, _ = bring_snapshot(there, tmp_path, lambda bucket: store, tmp_path / "cache", tmp_path / "home")
    assert (again / "labels.csv").read_text() == "a,1\n"

    (data / "december.csv").write_text("c,3\n")
    second = take(data)
    assert publish_snapshot(data, second, store, prefix) == 4
    grown, contents = bring_snapshot(there, tmp_path, lambda bucket: store, tmp_path / "cache", tmp_path / "home")
    assert contents == second != first and grown != folder
    assert (grown / "december.csv").read_text() == "c,3\n"


def test_a_file_of_a_published_snapshot_is_never_replaced(data: Path, store: ObjectStore) -> None:
    prefix = f"data/{uuid.uuid4().hex}/"
    publish_snapshot(data, take(data), store, prefix)
    (data / "labels.csv").write_text("other")
    with pytest.raises(ReleaseError, match=r"labels.csv: expected nothing or the same 5 bytes, got another file"):
        publish_snapshot(data, take(data), store, prefix)


def test_the_command_prints_the_hash_to_pin(data: Path, ship: Ship, store: ObjectStore) -> None:
    address = f"s3://{store.bucket}/data/{uuid.uuid4().hex}"
    ended = ship("snapshot", str(data), "--to", address)
    assert ended.status == 0, ended.text
    assert f"sha256: {take(data).sha256}" in ended.output and "260 B sent" in ended.output
    assert ship("snapshot", str(data / "labels.csv")).status == 2
    assert ship("snapshot", str(data), "--to", "s3:/typo").status == 2

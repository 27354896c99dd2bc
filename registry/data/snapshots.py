"""Snapshots of data: a folder, or a prefix of a bucket, with a manifest that names every file by hash and size.

The manifest's own hash says which data it is, when every file is what the manifest says; before training all are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from shipreader.records import FileEntry, file_above
from torchworker import situations
from torchworker.durable import write_durably
from train_and_ship.infra.errors import JobError, PreconditionFailedError, ReleaseError, RequestError
from train_and_ship.infra.file_hashes import ELSEWHERE, FileHashes, Identity
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.objectstore import ListedObject, ObjectStore
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.job.data import Snapshot
from train_and_ship.registry.release.files import (
    file_table,
    read_table,
    require_file,
    require_relative,
    require_size,
    walk,
)

SNAPSHOT = "SNAPSHOT.json"
SNAPSHOT_BYTES = 512 * 2**20
"""Of a manifest that is read from a bucket: millions of files."""
_FORMAT = 1
Stores = Callable[[str], ObjectStore]
"""The store of a bucket by its name."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a snapshot holds."""

    files: Mapping[str, FileEntry]
    """By relative POSIX path."""
    sha256: str
    """Of its manifest, hexadecimal: which data it is."""

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())


def take(folder: Path) -> Contents:
    """Hash every file below a folder and write its manifest, atomically. Raises RequestError for an empty folder,
    ReleaseError for links and special files."""
    files = {}
    for name, path in walk(folder):
        if name != SNAPSHOT:
            require_relative(name)
            files[name] = FileEntry.of(path)
    if not files:
        raise RequestError(f"{folder}: expected at least one file, found none")
    body = _encode(files)
    write_durably(folder / SNAPSHOT, body)
    return Contents(files=files, sha256=sha256(body).hexdigest())


def publish_snapshot(folder: Path, contents: Contents, store: ObjectStore, prefix: str) -> int:
    """Upload what the bucket lacks, the manifest last. Can be repeated.

    A file is never replaced, so a snapshot grows by new names; its manifest is.

    Args:
        folder: where the files lie.
        contents: the snapshot's manifest.
        store: the bucket.
        prefix: where the snapshot lies there.

    Returns:
        The bytes that were sent.

    Raises:
        ReleaseError: a name holds other content there.
    """

    def bring(name: str) -> int:
        key, entry = prefix + name, contents.files[name]
        try:
            store.upload_file_new(folder / name, key, entry.sha256)
            return entry.bytes
        except PreconditionFailedError:
            if store.hash(key, entry.bytes) != (entry.sha256, entry.bytes):
                raise ReleaseError(
                    f"s3://{store.bucket}/{key}: expected nothing or the same {entry.bytes:,} bytes, got another file; "
                    "files of a snapshot are never replaced: give the new one another name"
                ) from None
            return 0

    sent = sum(in_parallel(bring, sorted(contents.files)))
    body = (folder / SNAPSHOT).read_bytes()
    there = store.get(prefix + SNAPSHOT, SNAPSHOT_BYTES)
    if there is None:
        store.put_new(prefix + SNAPSHOT, body)
    elif there[0] != body:
        store.replace(prefix + SNAPSHOT, body, there[1])
    return sent


def identify(snapshot: Snapshot, project: Path, stores: Stores, home: Path) -> Contents:
    """Which data it is by its manifest, when every file is what that says; what was hashed before and has not been
    touched since is not read again.

    Args:
        snapshot: what the job says of it.
        project: absolute project folder, to which a path is relative.
        stores: opens the bucket that an address names.
        home: SHIP_HOME, where hashes are remembered.

    Raises:
        JobError: there is no manifest, or another one than the job pins, or files were added, removed, resized or
            altered after it was made: then it would hide that the data has changed.
    """
    contents, there = _listed(snapshot, project, stores)
    bucket, prefix = split_address(snapshot.path)
    hashes = _hashes(snapshot, project, home)

    def verify(name: str) -> None:
        if bucket:
            got = _hash_in_bucket(stores(bucket), prefix + name, there[name], hashes)
        else:
            got = hashes.sha256(_local(snapshot, project) / name)
        if got != contents.files[name].sha256:
            raise _not_as_said(f"{name}: expected SHA-256 {contents.files[name].sha256}, got {got}")

    try:
        in_parallel(verify, sorted(contents.files))
    finally:
        hashes.save()
    return contents


def _hashes(snapshot: Snapshot, project: Path, home: Path) -> FileHashes:
    bucket, _ = split_address(snapshot.path)
    return FileHashes(home, snapshot.path if bucket else str(_local(snapshot, project)))


def _object(store: ObjectStore, key: str, found: ListedObject) -> tuple[str, Identity]:
    """How it is remembered, and what says that it is the same."""
    return f"{ELSEWHERE}{store.bucket}/{key}", (found.etag, found.bytes, found.modified.isoformat())


def _hash_in_bucket(store: ObjectStore, key: str, found: ListedObject, hashes: FileHashes) -> str:
    """Of an object, by what is remembered, by the store's own checksum, or read."""
    name, identity = _object(store, key, found)
    if (known := hashes.recall(name, identity)) is not None:
        return known
    told = store.head(key)
    sha256 = told.stored_sha256 if told is not None and told.etag == found.etag else None
    if sha256 is None:
        sha256, _ = store.hash(key, found.bytes) or ("none", 0)
    hashes.remember(name, identity, sha256)
    return sha256


def _listed(snapshot: Snapshot, project: Path, stores: Stores) -> tuple[Contents, Mapping[str, ListedObject]]:
    """The manifest, and what a bucket says of the files, by name. Names and sizes are as the manifest says.

    Raises JobError.
    """
    bucket, prefix = split_address(snapshot.path)
    listed: dict[str, ListedObject] = {}
    if bucket:
        store = stores(bucket)
        found = store.get(prefix + SNAPSHOT, SNAPSHOT_BYTES)
        body, where = (found[0] if found else None), f"s3://{bucket}/{prefix}{SNAPSHOT}"
        listed = {key.removeprefix(prefix): item for key, item in store.list_objects(prefix).items()}
        there = {name: item.bytes for name, item in listed.items()}
    else:
        folder = _local(snapshot, project)
        path = folder / SNAPSHOT
        body, where = (path.read_bytes() if path.is_file() else None), str(path)
        there = {name: found.stat().st_size for name, found in walk(folder)} if body is not None else {}
    if body is None:
        raise JobError(f"data.snapshot: expected {where}, found none; `ship snapshot FOLDER` writes it")
    digest = sha256(body).hexdigest()
    if snapshot.sha256 is not None and digest != snapshot.sha256:
        raise JobError(
            f"data.snapshot: {where}: expected SHA-256 {snapshot.sha256}, as the job file says, got {digest}: it is "
            "another snapshot"
        )
    files = _decode(body, where)
    there.pop(SNAPSHOT, None)
    said = {name: entry.bytes for name, entry in files.items()}
    if there != said:
        name = min(name for name in there.keys() | said.keys() if there.get(name) != said.get(name))
        raise _not_as_said(f"{where} says {name}: {_size(said.get(name))}, and there is {_size(there.get(name))}")
    return Contents(files=files, sha256=digest), listed


def _size(size: int | None) -> str:
    return "no such file" if size is None else f"{size:,} bytes"


def _not_as_said(what: str) -> JobError:
    return JobError(
        f"data.snapshot: {what}; {situations.ALTERED_SNAPSHOT}. `ship snapshot` takes a new one, if it was "
        "meant to change"
    )


def bring_snapshot(snapshot: Snapshot, project: Path, stores: Stores, cache: Path, home: Path) -> tuple[Path, Contents]:
    """The folder of a snapshot, every file verified; one in a bucket is downloaded into the cache, what it lacks of it.

    Args:
        snapshot: what the job says of it.
        project: absolute project folder, to which a path is relative.
        stores: opens the bucket that an address names.
        cache: folder of downloaded snapshots.
        home: SHIP_HOME, where the hashes are remembered.

    Returns:
        The folder, and what the manifest says.

    Raises:
        JobError: with the file, what was expected and what was found.
    """
    contents, there = _listed(snapshot, project, stores)
    bucket, prefix = split_address(snapshot.path)
    folder = cache / contents.sha256[:20] if bucket else _local(snapshot, project)
    hashes = _hashes(snapshot, project, home)
    if bucket:
        hold(folder)
        make_folder(folder)
        # When it was used last.
        os.utime(folder)

    def verify(name: str) -> None:
        path, entry = folder / name, contents.files[name]
        if bucket and not (path.is_file() and FileEntry.of(path) == entry):
            _download(stores(bucket), prefix + name, path, entry.bytes)
            require_file(path, entry)
            hashes.remember(*_object(stores(bucket), prefix + name, there[name]), entry.sha256)
            return
        require_size(path, entry)
        if (got := hashes.fresh(path)) != entry.sha256:
            raise ReleaseError(f"{path}: expected SHA-256 {entry.sha256}, got {got}")

    try:
        in_parallel(verify, sorted(contents.files))
    except ReleaseError as error:
        raise _not_as_said(str(error)) from error
    finally:
        hashes.save()
    return folder, contents


def _download(store: ObjectStore, key: str, path: Path, most: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    if not store.download_file(key, part, most=most):
        raise ReleaseError(f"s3://{store.bucket}/{key}: expected a file of the snapshot, found none")
    # Not synced: every file is hashed before each use, and fetched again.
    part.replace(path)


def split_address(path: str) -> tuple[str, str]:
    """(bucket, prefix that ends with /) of `s3://bucket/prefix`; two empty texts for a folder."""
    parts = urlsplit(path)
    if parts.scheme != "s3":
        return "", ""
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def _local(snapshot: Snapshot, project: Path) -> Path:
    return (project / snapshot.path).resolve()


def _encode(files: Mapping[str, FileEntry]) -> bytes:
    return canonical_json({"format": _FORMAT, "files": file_table(files)})


def _decode(body: bytes, where: str) -> dict[str, FileEntry]:
    try:
        document = json.loads(body)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r}")
        files = read_table(document["files"])
        for name in files:
            require_relative(name)
        if (clash := file_above(files)) is not None:
            raise ValueError(f"{clash[0]}, a file, which is the folder of {clash[1]} too")
        return files
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, ReleaseError) as error:
        raise JobError(f"data.snapshot: {where}: expected the manifest of a snapshot, got {error}") from None

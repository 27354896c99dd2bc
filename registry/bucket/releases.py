"""Releases in the bucket: immutable files, and a manifest that is written last.

Functions that write say so; the others only read. All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shipreader.records import MANIFEST_BYTES, FileEntry, require_sparse, room, values_in
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.objectstore import ListedObject, ObjectStore, StoredObject
from train_and_ship.infra.shown import on_one_line, whole
from train_and_ship.registry.bucket.keys import release_prefix, reports_prefix
from train_and_ship.registry.bucket.signing import publish_signature
from train_and_ship.registry.bucket.tombstones import claim
from train_and_ship.registry.bucket.transfer import (
    FILES_AT_ONCE,
    SMALL_FILES_AT_ONCE,
    SMALL_UPLOADS_AT_ONCE,
    Meter,
    Progress,
    in_parallel,
    put_immutable,
)
from train_and_ship.registry.release.files import require_file, require_size
from train_and_ship.registry.release.manifest import (
    DATA,
    ENVIRONMENT,
    JOB,
    LINEAGE,
    MANIFEST,
    VERDICTS,
    Manifest,
    decode_manifest,
    verify_folder,
)

LISTED_AT_ONCE = 990
"""A page of a listing has a thousand keys, and the manifest and signatures are among them."""
TOLD_BYTES, TOLD_VALUES = 16 * 2**20, 100_000
"""Of a file that says how a release came to be: a job, packages, counts of its data."""
TOLD = {
    JOB: "shorten the job file",
    VERDICTS: "measure fewer cases, formats or metrics",
    LINEAGE: "keep data that the project opens in `data`, or fewer files in its folder",
    DATA: "describe fewer classes or columns",
    ENVIRONMENT: "install fewer packages where it is trained",
}
"""Files in which a release says how it came to be, and what makes one smaller."""
_HALF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
_MENDED = "files of a release are never replaced: delete it and publish again"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` did."""

    release: str
    sent_bytes: int
    present_bytes: int
    """Size of the files that the bucket had already."""
    etags: Mapping[str, str]
    """Of each file, by its path: an object that has this ETag is the one that was verified."""


def publish(
    store: ObjectStore,
    folder: Path,
    manifest: Manifest,
    progress: Progress | None = None,
    *,
    signing_key: Path | None = None,
) -> Published:
    """Bring a release into the bucket: files in parallel, the manifest last. Writes; can be repeated.

    Bytes that are there are not sent again. Each file is read once and sent with its hash; what the store does not
    compare with that is read back, and so is what was there and the store keeps no hash of.

    Args:
        store: the bucket.
        folder: where the release's files lie.
        manifest: what they are.
        progress: called with the bytes that are there and those there will be.
        signing_key: private key (PEM) to sign it with, before the manifest is written; see registry/bucket/signing.py.

    Raises:
        StoreRefusedError: the store has no conditional writes.
        ReleaseError: a local file is not what the manifest says, or the bucket holds other bytes under its name. Or it
            says more of itself than anybody reads.
    """
    require_readable(folder, manifest)
    traits = store.probe_again()
    claim(store, manifest.model, manifest.release, publishing=True)
    prefix = release_prefix(manifest.model, manifest.release)
    present = store.list_keys(prefix)
    meter = Meter(manifest.total_bytes, progress)

    def bring(name: str) -> tuple[bool, str]:
        """Whether the file was sent, and its ETag."""
        entry, key, path = manifest.files[name], prefix + name, folder / name
        sent = False
        if key not in present:
            require_size(path, entry)
            try:
                etag = store.upload_file_new(path, key, entry.sha256, meter.of(name))
                sent = True
            except PreconditionFailedError:
                # Somebody was faster, or our own reply was lost.
                pass
        if not sent:
            # What is read below need not be read twice.
            etag = _require_object(store, key, entry, believe_writer=not traits.checks_bodies).etag
        if not traits.checks_bodies:
            # Also what an uploader left that died before this line.
            _require_content(store, key, entry)
        meter.finish(name, entry.bytes)
        return sent, etag

    # Big files first: the last one to start decides when all are done.
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    brought = dict(zip(names, in_parallel(bring, names, SMALL_UPLOADS_AT_ONCE), strict=True))
    if signing_key is not None:
        publish_signature(store, manifest, signing_key)
    put_immutable(store, prefix + MANIFEST, manifest.encode(), "another description of the same files")
    sent_bytes = sum(manifest.files[name].bytes for name, (sent, _) in brought.items() if sent)
    return Published(
        release=manifest.release,
        sent_bytes=sent_bytes,
        present_bytes=manifest.total_bytes - sent_bytes,
        etags={name: etag for name, (_, etag) in brought.items()},
    )


def require_readable(folder: Path, manifest: Manifest) -> None:
    """Raises ReleaseError for files that say how a release came to be and that whoever compares it would not read.

    folder: where they lie.
    """
    for name in TOLD:
        if name not in manifest.files:
            continue
        size, most = manifest.files[name].bytes, f"{folder / name}: expected at most"
        way_out = f"or nobody could compare or promote the release; {TOLD[name]}, and publish again"
        if size > TOLD_BYTES:
            raise ReleaseError(f"{most} {TOLD_BYTES:,} bytes, got {size:,}, {way_out}")
        require_size(folder / name, manifest.files[name])
        said = (folder / name).read_bytes()
        values = said.count(b"==") if name == ENVIRONMENT else values_in(said)
        if values > TOLD_VALUES:
            raise ReleaseError(f"{most} {TOLD_VALUES:,} values, got {values:,} in {size:,} bytes, {way_out}")


def verify_release(
    store: ObjectStore,
    model: str,
    release: str,
    *,
    etags: Mapping[str, str] | None = None,
    read_back: bool | None = None,
    sha256: str | None = None,
) -> Manifest:
    """Check that a release is complete: its manifest is its own, and every file is there with its size and hash.

    What a file's writer said of its hash is the word of whoever may write there: it is only believed when asked for.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        etags: those of `publish`, by path. Objects that have them still are the ones that were verified, and one
            listing tells; the others are looked at as without `read_back`.
        read_back: download and hash every file, which finds what rotted in the store; None reads those of which the
            store keeps no hash of its own, and False none: then the writer's word counts.
        sha256: as in `read_manifest`.

    Raises:
        ReleaseError: with the file, what was expected and what was found.
    """
    prefix = release_prefix(model, release)
    manifest = read_manifest(store, model, release, sha256=sha256)
    if etags is None:

        def require(name: str) -> None:
            if read_back:
                _require_content(store, prefix + name, manifest.files[name])
            else:
                _require_object(store, prefix + name, manifest.files[name], believe_writer=read_back is False)

        in_parallel(require, manifest.files, FILES_AT_ONCE if read_back else SMALL_FILES_AT_ONCE)
        return manifest
    listed = _listed(store, prefix, manifest)
    for name, entry in manifest.files.items():
        found = listed.get(prefix + name)
        if found is None:
            raise _missing(prefix + name, entry)
        if found.etag != etags.get(name):
            _require_object(store, prefix + name, entry)
    return manifest


def read_manifest(store: ObjectStore, model: str, release: str, *, sha256: str | None = None) -> Manifest:
    """A release's manifest.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        sha256: hexadecimal hash that it must have, where a pointer says so.

    Raises:
        ReleaseError: there is none, or it is not this release's.
    """
    key = release_prefix(model, release) + MANIFEST
    found = store.get(key, MANIFEST_BYTES)
    if found is None:
        raise ReleaseError(
            f"{key}: expected the manifest of a complete release, got none: it was never published to the end"
        )
    got = hashlib.sha256(found[0]).hexdigest()
    if sha256 is not None and got != sha256:
        raise ReleaseError(f"{key}: expected SHA-256 {sha256}, got {got}: it was altered after it went live")
    manifest = decode_manifest(found[0])
    if (manifest.model, manifest.release) != (model, release):
        raise ReleaseError(
            f"{key}: expected the manifest of {model} {release}, got that of {manifest.model} {manifest.release}"
        )
    return manifest


def read_small_file(store: ObjectStore, manifest: Manifest, name: str) -> bytes:
    """A file of a release that says how it came to be, as the manifest has it.

    Raises ReleaseError when there is none, or another one, and for one that is too long to be held in memory.
    """
    key = release_prefix(manifest.model, manifest.release) + name
    if name not in manifest.files:
        raise ReleaseError(f"{key}: expected a file of the release, got none")
    found = store.get(key, min(manifest.files[name].bytes, TOLD_BYTES))
    if found is None or hashlib.sha256(found[0]).hexdigest() != manifest.files[name].sha256:
        raise ReleaseError(f"{key}: expected what the manifest says, got another")
    return found[0]


def told_document(encoded: bytes) -> Any:
    """The JSON of such a file, whose texts can be written anywhere.

    Raises ValueError for more values than one of ours has, and RecursionError.
    """
    require_sparse(encoded, TOLD_VALUES)
    document = json.loads(encoded.decode())
    if _HALF_A_CHARACTER.search(encoded):
        # Names of folders that are no text are written so too. No record, report or request could hold them.
        document = json.loads(whole(json.dumps(document, ensure_ascii=False), escape=r"\\"))
    return document


def fetch_release(
    store: ObjectStore,
    model: str,
    release: str,
    folder: Path,
    *,
    manifest_sha256: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Download a release, with its MANIFEST.json. Writes to disk only.

    The folder appears complete, by one rename, after every file was verified by hash; one that is there already is
    verified instead.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        folder: the new folder.
        manifest_sha256: as `sha256` of `read_manifest`.
        progress: called with the bytes that are there and those there will be.

    Raises:
        ReleaseError: files are missing or altered.
    """
    manifest = read_manifest(store, model, release, sha256=manifest_sha256)
    if folder.exists():
        verify_folder(folder, manifest)
        return manifest
    prefix = release_prefix(model, release)
    meter = Meter(manifest.total_bytes, progress)
    make_folder(folder.parent)
    free = shutil.disk_usage(folder.parent).free
    if (needed := room(manifest.files)) > free:
        raise ReleaseError(
            f"release {release} of {model}: expected room for {needed:,} bytes in {folder.parent}, got {free:,}"
        )
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")

    def fetch(name: str) -> None:
        path = draft / name
        make_folder(path.parent)
        entry = manifest.files[name]
        for last in (False, True):
            try:
                there = store.download_file(prefix + name, path, meter.of(name), entry.bytes)
                if there:
                    require_file(path, entry)
                break
            except ReleaseError as error:
                # Once may be the way here, twice is the bucket.
                if last:
                    raise ReleaseError(f"{prefix}{name}: altered in the bucket: {error}") from None
        if not there:
            raise _missing(prefix + name, entry)
        meter.finish(name, entry.bytes)

    try:
        draft.mkdir()
        in_parallel(fetch, manifest.files)
        (draft / MANIFEST).write_bytes(manifest.encode())
        try:
            # Not synced: what is there already is hashed before each use, and fetched again.
            draft.rename(folder)
        except OSError:
            # Somebody else fetched the same release at the same time.
            if not folder.is_dir():
                raise
            verify_folder(folder, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


# ---- below


def _listed(store: ObjectStore, prefix: str, manifest: Manifest) -> dict[str, ListedObject]:
    """What the bucket lists of the manifest's files: the pages of a long listing at the same time, by expected name."""
    keys = sorted(prefix + name for name in manifest.files)
    ends = [*keys[LISTED_AT_ONCE - 1 : -1 : LISTED_AT_ONCE], keys[-1]]
    begins = dict(zip(ends, ["", *ends], strict=False))
    parts = in_parallel(lambda end: store.list_objects(prefix, after=begins[end], until=end), ends)
    return {key: listed for part in parts for key, listed in part.items()}


def _missing(key: str, entry: FileEntry) -> ReleaseError:
    return ReleaseError(f"{key}: expected a file of {entry.bytes:,} bytes in the bucket, got none")


def _require_object(store: ObjectStore, key: str, entry: FileEntry, *, believe_writer: bool = False) -> StoredObject:
    """What HEAD says. Raises ReleaseError unless the object has the entry's size and hash.

    It is read back where the store keeps no hash of it: for parts, and stores without checksums.

    believe_writer: not when whoever wrote it said which hash it has.
    """
    stored = store.head(key)
    if stored is None:
        raise _missing(key, entry)
    if stored.bytes != entry.bytes:
        raise ReleaseError(f"{key}: expected {entry.bytes:,} bytes in the bucket, got {stored.bytes:,}; {_MENDED}")
    known = {sha256 for sha256 in (stored.sha256, stored.stored_sha256) if sha256 is not None}
    if known - {entry.sha256}:
        got = ", ".join(on_one_line(sha256) for sha256 in sorted(known))
        raise ReleaseError(f"{key}: expected SHA-256 {entry.sha256} in the bucket, got {got}; {_MENDED}")
    if stored.stored_sha256 is None and not (believe_writer and known):
        # User metadata says what its writer wants: whoever may write there can put other bytes under the same words.
        _require_content(store, key, entry)
    return stored


def _require_content(store: ObjectStore, key: str, entry: FileEntry) -> None:
    """Read the object back. Raises ReleaseError unless a reader gets exactly the entry's bytes."""
    got = store.hash(key, entry.bytes)
    if got != (entry.sha256, entry.bytes):
        raise ReleaseError(
            f"{key}: expected SHA-256 {entry.sha256} and {entry.bytes:,} bytes when read back, got {got}; {_MENDED}"
        )


def put_report(store: ObjectStore, model: str, release: str, flow_run: str, html: str) -> str:
    """Put a run's report beside the release. Writes; returns the key, which begins with the time.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        flow_run: id of the run that the report is about.
        html: the report.
    """
    key = f"{reports_prefix(model, release)}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{flow_run}.html"
    put_immutable(store, key, html.encode(), "another report")
    return key

"""Releases and channels in the bucket.

    models/<model>/releases/<release>/<file>…              immutable
    models/<model>/releases/<release>/MANIFEST.json        written last: where it is, every file is
    models/<model>/channels/<channel>.json                 the pointer, the only key that is ever replaced
    models/<model>/history/<channel>/<generation>.json     one copy of the pointer for each move, immutable

A move is one conditional PUT of the pointer. Its generation and nonce make every pointer unique, so an ETag is never
met again, and a mover whose reply was lost recognises its own move by the nonce. The pointer carries the whole record
of its move, and whoever replaces it makes sure first that this record is in the history: a mover that dies right after
its PUT leaves no hole.

Functions that write say so; the others only read. All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from infra.errors import ReleaseError, ServiceError
from infra.objectstore import ObjectStore, PreconditionFailed
from registry.release import (
    MANIFEST,
    FileEntry,
    Manifest,
    canonical_json,
    decode_manifest,
    require_file,
    require_name,
    require_release_id,
    verify_folder,
)

FILES_AT_ONCE = 8
MOVE_CONFLICTS = 50
"""How often a mover may find that another was faster."""
MOVE_FAULTS = 5
"""How often in one move the store may not answer, or answer with a fault."""
LONGEST_PAUSE_SECONDS = 1.0

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread, one call at a time."""


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What is live on a channel, and the record of the move that made it so."""

    model: str
    channel: str
    generation: int
    """1 for the first move of a channel, one more for each."""
    release: str
    manifest_sha256: str
    """Hexadecimal SHA-256 of the release's MANIFEST.json."""
    previous: str | None
    """The release that was live before."""
    nonce: str
    """Random; by it a mover knows its own move."""
    moved_at: str
    """UTC, ISO 8601, by the mover's clock."""
    moved_by: str
    reason: str
    flow_run: str
    """Id of the flow run that moved it; empty outside a flow."""
    mlflow_version: str
    """Version of the model in MLflow; empty when it has none."""
    etag: str = field(default="", compare=False)
    """The object's ETag when it was read; no part of the record."""

    def encode(self) -> bytes:
        """The record as canonical JSON."""
        record = {name: getattr(self, name) for name in _RECORD}
        return canonical_json({"format": _POINTER_FORMAT, **record})


_POINTER_FORMAT = 1
_RECORD = tuple(item.name for item in fields(Pointer) if item.name != "etag")

Accept = Callable[[Pointer | None, Manifest | None], None]
"""Given what is live and its manifest, both None on an unused channel; raises GateError to keep it."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` did."""

    release: str
    sent_bytes: int
    present_bytes: int
    """Size of the files that the bucket had already."""


def release_prefix(model: str, release: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_release_id(release)
    return f"models/{model}/releases/{release}/"


def pointer_key(model: str, channel: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_name("channel", channel)
    return f"models/{model}/channels/{channel}.json"


def history_prefix(model: str, channel: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_name("channel", channel)
    return f"models/{model}/history/{channel}/"


# ---- releases


def publish(store: ObjectStore, folder: Path, manifest: Manifest, progress: Progress | None = None) -> Published:
    """Bring a release into the bucket: files in parallel, the manifest last. Writes; can be repeated.

    Bytes that are there are not sent again. Raises StoreRefused for a store without conditional writes, and
    ReleaseError when a local file is not what the manifest says, or when the bucket holds other bytes under its name.
    """
    traits = store.probe()
    prefix = release_prefix(manifest.model, manifest.release)
    present = store.list_keys(prefix)
    complete = prefix + MANIFEST in present
    meter = _Meter(manifest.total_bytes, progress)

    def bring(name: str) -> bool:
        """Whether the file was sent."""
        entry, key, path = manifest.files[name], prefix + name, folder / name
        sent = False
        if key not in present:
            # A wrong body under an immutable key would spoil the release for good.
            require_file(path, entry)
            try:
                store.upload_file_new(path, key, entry.sha256, meter.of(name))
                sent = True
            except PreconditionFailed:
                # Somebody was faster, or our own reply was lost.
                pass
        _require_object(store, key, entry)
        # Parts have checksums of their own only. What an uploader left that died before this line is read back too.
        checked = traits.checks_sha256 and entry.bytes <= store.multipart_bytes
        if not checked and not complete:
            _require_content(store, key, entry)
        meter.finish(name, entry.bytes)
        return sent

    # Big files first: the last one to start decides when all are done.
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    sent = dict(zip(names, _parallel(bring, names), strict=True))
    _put_immutable(store, prefix + MANIFEST, manifest.encode(), "another description of the same files")
    sent_bytes = sum(manifest.files[name].bytes for name in names if sent[name])
    return Published(release=manifest.release, sent_bytes=sent_bytes, present_bytes=manifest.total_bytes - sent_bytes)


def verify_release(store: ObjectStore, model: str, release: str) -> Manifest:
    """Check that a release is complete: its manifest is its own, and every file has the right size and hash by HEAD.

    Downloads the manifest only. Raises ReleaseError with the file, what was expected and what was found.
    """
    prefix = release_prefix(model, release)
    manifest = read_manifest(store, model, release)
    _parallel(lambda name: _require_object(store, prefix + name, manifest.files[name]), manifest.files)
    return manifest


def read_manifest(store: ObjectStore, model: str, release: str, *, sha256: str | None = None) -> Manifest:
    """A release's manifest. Raises ReleaseError when there is none, or it is not this release's.

    sha256: hexadecimal hash that it must have, where a pointer says so.
    """
    key = release_prefix(model, release) + MANIFEST
    found = store.get(key)
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


def fetch_release(
    store: ObjectStore,
    model: str,
    release: str,
    folder: Path,
    *,
    manifest_sha256: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Download a release into the new folder `folder`, with its MANIFEST.json. Writes to disk only.

    The folder appears complete, by one rename, after every file was verified by hash; one that is there already is
    verified instead. manifest_sha256: as in `read_manifest`. Raises ReleaseError for files that are missing or altered.
    """
    manifest = read_manifest(store, model, release, sha256=manifest_sha256)
    if folder.exists():
        verify_folder(folder, manifest)
        return manifest
    prefix = release_prefix(model, release)
    meter = _Meter(manifest.total_bytes, progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")

    def fetch(name: str) -> None:
        path = draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not store.download_file(prefix + name, path, meter.of(name)):
            raise ReleaseError(
                f"{prefix}{name}: expected a file of {manifest.files[name].bytes:,} bytes in the bucket, got none"
            )
        try:
            require_file(path, manifest.files[name])
        except ReleaseError as error:
            raise ReleaseError(f"{prefix}{name}: altered in the bucket: {error}") from None
        meter.finish(name, manifest.files[name].bytes)

    try:
        draft.mkdir()
        _parallel(fetch, manifest.files)
        (draft / MANIFEST).write_bytes(manifest.encode())
        try:
            draft.rename(folder)
        except OSError:
            # Somebody else fetched the same release at the same time.
            if not folder.is_dir():
                raise
            verify_folder(folder, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


# ---- channels


def read_pointer(store: ObjectStore, model: str, channel: str) -> Pointer | None:
    """What is live on a channel, with the ETag it was read under; None on an unused channel."""
    key = pointer_key(model, channel)
    found = store.get(key)
    if found is None:
        return None
    pointer = _decode_pointer(found[0], key)
    if (pointer.model, pointer.channel) != (model, channel):
        raise ReleaseError(f"{key}: expected the pointer of {model} {channel}, got {pointer.model} {pointer.channel}")
    return replace(pointer, etag=found[1])


def read_live(store: ObjectStore, model: str, channel: str) -> tuple[Pointer | None, Manifest | None]:
    """What is live on a channel and its manifest; ReleaseError when its manifest is missing or altered."""
    pointer = read_pointer(store, model, channel)
    return pointer, _live_manifest(store, pointer)


def read_history(store: ObjectStore, model: str, channel: str) -> list[Pointer]:
    """Every move of a channel, oldest first; the last one is what was live when this was called."""
    # The pointer first: by then every older record is in the history.
    live = read_pointer(store, model, channel)
    records = _parallel(lambda key: _read_record(store, key), store.list_keys(history_prefix(model, channel)))
    if live is None:
        return records
    return [record for record in records if record.generation < live.generation] + [live]


def move_channel(
    store: ObjectStore,
    manifest: Manifest,
    *,
    model: str,
    channel: str,
    reason: str,
    moved_by: str,
    flow_run: str,
    mlflow_version: str,
    accept: Accept | None,
) -> Pointer:
    """Make a published release live on a channel, once, atomically. Writes; can be repeated.

    `accept` is asked about what is live, and again whenever that has changed before our move; None asks nobody and
    reads nothing of the live release, which may be broken. A channel that has this release already is left as it is.

    Returns the pointer that this call, or an earlier one, wrote. It was live, but another mover may have followed.
    Raises ReleaseError when the release is incomplete or is not what `manifest` says, GateError from `accept`,
    StoreRefused for a store without conditional writes, and ServiceError when it could not be done, or not be told,
    after several attempts: then call again.
    """
    store.probe()
    release, manifest_sha256 = manifest.release, manifest.sha256()
    stored = verify_release(store, model, release)
    if stored.sha256() != manifest_sha256:
        raise ReleaseError(f"release {release} of {model}: the bucket has the same files with another description")
    nonce = uuid.uuid4().hex
    tried: Pointer | None = None
    accepted: str | None = None
    acknowledged = False
    conflicts = faults = 0
    while True:
        try:
            live = read_pointer(store, model, channel)
            if tried is not None and (mine := _outcome(store, tried, live)) is not None:
                _record_if_possible(store, mine)
                return mine
            if acknowledged:
                raise ReleaseError(
                    f"{model} {channel}: the store acknowledged generation {tried.generation if tried else 0}, "
                    f"but what is live is {live}: it does not keep what it promised"
                )
            if live is not None:
                # Before it is replaced: its own mover may have died.
                _record(store, live)
                if (live.release, live.manifest_sha256) == (release, manifest_sha256):
                    return live
            if accept is not None and accepted != _version(live):
                accept(live, _live_manifest(store, live))
                accepted = _version(live)
            tried = Pointer(
                model=model,
                channel=channel,
                generation=live.generation + 1 if live else _first_generation(store, model, channel),
                release=release,
                manifest_sha256=manifest_sha256,
                previous=live.release if live else None,
                nonce=nonce,
                moved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                moved_by=moved_by,
                reason=reason,
                flow_run=flow_run,
                mlflow_version=mlflow_version,
            )
            _put_pointer(store, tried, live)
            # Read back at once: a 200 is believed when it is seen.
            acknowledged = True
        except PreconditionFailed as error:
            # Another was faster, or it is ours and the reply was lost: reading tells.
            conflicts += 1
            if conflicts >= MOVE_CONFLICTS:
                raise ServiceError(
                    f"{model} {channel}: not moved: others moved it {conflicts} times while this was tried"
                ) from error
            _pause(conflicts)
        except ServiceError as error:
            faults += 1
            if not error.retryable or faults >= MOVE_FAULTS:
                raise
            _pause(faults)


# ---- below


def _outcome(store: ObjectStore, tried: Pointer, live: Pointer | None) -> Pointer | None:
    """The pointer as our attempt wrote it, when it took place: still live, or in the history if others followed."""
    if live is None or live.generation < tried.generation:
        return None
    if live.nonce == tried.nonce:
        return live
    if live.generation == tried.generation:
        return None
    # Whoever replaced ours made sure first that it is there.
    key = _record_key(tried)
    record = _read_record(store, key)
    return record if record.nonce == tried.nonce else None


def _put_pointer(store: ObjectStore, pointer: Pointer, live: Pointer | None) -> None:
    """Replace what is live, or create the first pointer. Raises PreconditionFailed when something else is live."""
    key = pointer_key(pointer.model, pointer.channel)
    if live is None:
        store.put_new(key, pointer.encode())
    else:
        store.replace(key, pointer.encode(), live.etag)


def _live_manifest(store: ObjectStore, live: Pointer | None) -> Manifest | None:
    if live is None:
        return None
    try:
        return read_manifest(store, live.model, live.release, sha256=live.manifest_sha256)
    except ReleaseError as error:
        raise ReleaseError(
            f"the live release of {live.model} {live.channel} is broken; no candidate can be held against it: {error}"
        ) from error


def _version(live: Pointer | None) -> str:
    return live.nonce if live else ""


def _pause(times: int) -> None:
    """Wait a random while, longer each time: racers that pause alike meet again."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.01 * 2**times)))


def _record_key(pointer: Pointer) -> str:
    return f"{history_prefix(pointer.model, pointer.channel)}{pointer.generation:08d}.json"


def _record(store: ObjectStore, pointer: Pointer) -> None:
    """Make sure that the history has this move. Writes; can be repeated."""
    _put_immutable(store, _record_key(pointer), pointer.encode(), "record of another move")


def _record_if_possible(store: ObjectStore, pointer: Pointer) -> None:
    try:
        _record(store, pointer)
    except ServiceError as error:
        # The pointer holds the record, and the next mover or reader of the history uses that.
        _log.warning("generation %d is live; its copy in the history follows later: %s", pointer.generation, error)


def _read_record(store: ObjectStore, key: str) -> Pointer:
    found = store.get(key)
    if found is None:
        raise ReleaseError(f"{key}: expected the record of a move, got none: it was deleted")
    return _decode_pointer(found[0], key)


def _first_generation(store: ObjectStore, model: str, channel: str) -> int:
    """1, or one more than the history knows where somebody deleted the pointer."""
    prefix = history_prefix(model, channel)
    names = [key.removeprefix(prefix).removesuffix(".json") for key in store.list_keys(prefix)]
    return max((int(name) for name in names if name.isdecimal()), default=0) + 1


def _decode_pointer(encoded: bytes, key: str) -> Pointer:
    """Raises ReleaseError unless it is what `Pointer.encode` writes."""
    try:
        document = json.loads(encoded)
        if document.get("format") != _POINTER_FORMAT:
            raise ReleaseError(f"{key}: expected format {_POINTER_FORMAT}, got {document.get('format')!r}")
        pointer = Pointer(**{name: document[name] for name in _RECORD})
        texts = [getattr(pointer, name) for name in _RECORD if name not in ("generation", "previous")]
        texts.append(pointer.previous or "")
        if not all(isinstance(text, str) for text in texts) or type(pointer.generation) is not int:
            raise TypeError("a value of another type")
        if pointer.generation < 1:
            raise ValueError(f"generation {pointer.generation}")
        if pointer.encode() != encoded:
            raise ValueError("other keys or another spelling")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseError(f"{key}: expected the record of a move, got {type(error).__name__}: {error}") from None
    require_release_id(pointer.release)
    if pointer.previous is not None:
        require_release_id(pointer.previous)
    return pointer


def _put_immutable(store: ObjectStore, key: str, body: bytes, other: str) -> None:
    """Create the object, or find it there with the same bytes. Raises ReleaseError when it holds something else."""
    try:
        store.put_new(key, body)
        return
    except PreconditionFailed:
        found = store.get(key)
    if found is None or found[0] != body:
        raise ReleaseError(
            f"{key}: expected nothing or the same {len(body):,} bytes, got {other}; it is never replaced"
        )


def _require_object(store: ObjectStore, key: str, entry: FileEntry) -> None:
    """Raises ReleaseError unless the object has the entry's size and, by what the store knows of it, its hash."""
    stored = store.head(key)
    if stored is None:
        raise ReleaseError(f"{key}: expected a file of {entry.bytes:,} bytes in the bucket, got none")
    if stored.bytes != entry.bytes:
        raise ReleaseError(f"{key}: expected {entry.bytes:,} bytes in the bucket, got {stored.bytes:,}")
    known = {sha256 for sha256 in (stored.sha256, stored.stored_sha256) if sha256 is not None}
    if not known:
        # Brought here by some other tool.
        _require_content(store, key, entry)
    elif known != {entry.sha256}:
        raise ReleaseError(f"{key}: expected SHA-256 {entry.sha256} in the bucket, got {', '.join(sorted(known))}")


def _require_content(store: ObjectStore, key: str, entry: FileEntry) -> None:
    """Read the object back. Raises ReleaseError unless a reader gets exactly the entry's bytes."""
    got = store.hash(key)
    if got != (entry.sha256, entry.bytes):
        raise ReleaseError(
            f"{key}: expected SHA-256 {entry.sha256} and {entry.bytes:,} bytes when read back, got {got}; "
            "delete it and publish again"
        )


def _parallel(function: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
    """Call `function` for every name, a few at a time; the results in order. Stops at the first error and raises it."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="bucket") as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]


class _Meter:
    """Adds up the progress of files that move at the same time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Callable[[int], None] | None:
        """What is called with each number of bytes of one file that just moved."""
        return None if self._progress is None else lambda count: self._set(name, lambda done: done + count)

    def finish(self, name: str, size: int) -> None:
        self._set(name, lambda done: size)

    def _set(self, name: str, change: Callable[[int], int]) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done[name] = change(self._done.get(name, 0))
            self._progress(min(sum(self._done.values()), self._total), self._total)

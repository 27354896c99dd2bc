"""One release, from the bucket to this machine: every byte as its manifest says, and signed where keys are required."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from shipreader.bucket import Bucket
from shipreader.durable import write_durably
from shipreader.errors import RefusedError, UnavailableError
from shipreader.local import LocalFolder
from shipreader.records import (
    MANIFEST,
    MANIFEST_BYTES,
    FileEntry,
    Manifest,
    Pointer,
    decode_manifest,
    release_prefix,
    room,
)
from shipreader.signatures import (
    Signed,
    file_name,
    key_id,
    largest,
    require_signed,
    require_signed_by_any,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

FILES_AT_ONCE = 4


class Releases:
    """Those of a bucket in the folder of a serving machine."""

    def __init__(
        self, bucket: Bucket, local: LocalFolder, keys: Sequence[EllipticCurvePublicKey], max_bytes: int | None
    ) -> None:
        """Where they come from, where they go, and what is allowed.

        Args:
            bucket: it holds them.
            local: the folder of one channel.
            keys: one of them has to have signed; without any, no signature is asked for.
            max_bytes: releases that take more, with 4 KiB for each file and folder, are refused; None: no limit.
        """
        self._bucket, self._local, self._keys, self._max_bytes = bucket, local, keys, max_bytes

    def kept(self, pointer: Pointer) -> Manifest:
        """The release that a pointer names, as it is on the disk. Raises RefusedError where it is not all there."""
        manifest = self._local.verified(pointer)
        if self._keys:
            path = self._local.signature(manifest.release)
            if not path.is_file():
                raise RefusedError(f"{path}: expected a signature, got none: it was pulled before one was required")
            require_signed_by_any(path.read_bytes(), _signed(manifest), self._keys, str(path))
        return manifest

    def bring(
        self,
        pointer: Pointer,
        require: Callable[[Manifest], None] = lambda manifest: None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """The release that a pointer names, downloaded unless it is here.

        Args:
            pointer: it names the release and its manifest.
            require: called before any file is asked for; what it raises keeps the release out.
            interrupt: called again and again while files come; what it raises ends that.

        Raises:
            RefusedError: it is not what the pointer, its manifest or a signature says, or larger than allowed.
            UnavailableError: the bucket does not answer.
            OSError: the disk.
        """
        prefix = release_prefix(pointer.model, pointer.release)
        encoded = self._bucket.small(prefix + MANIFEST, MANIFEST_BYTES)
        if encoded is None:
            raise RefusedError(f"{prefix}{MANIFEST}: expected the manifest of a release, got none")
        manifest = decode_manifest(encoded, pointer)
        require(manifest)
        if self._keys:
            # Before any file is asked for.
            write_durably(self._local.signature(pointer.release), self._signature(manifest, prefix))
        if self._max_bytes is not None and (needed := room(manifest.files)) > self._max_bytes:
            raise RefusedError(f"{prefix}: expected at most {self._max_bytes:,} bytes on the disk, got {needed:,}")
        try:
            self._local.verified(pointer)
        except RefusedError:
            self._local.add(manifest, lambda draft, files: self._download(prefix, draft, files, interrupt))
        return manifest

    def _download(
        self, prefix: str, draft: Path, files: Mapping[str, FileEntry], interrupt: Callable[[], None]
    ) -> None:
        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="shipreader")
        try:
            jobs = [
                pool.submit(self._bucket.download, prefix + name, draft / name, entry, interrupt)
                for name, entry in sorted(files.items(), key=lambda item: -item[1].bytes)
            ]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _signature(self, manifest: Manifest, prefix: str) -> bytes:
        """The signature in the bucket that holds.

        Raises RefusedError when there is none by the required keys, and UnavailableError when one of them cannot be
        asked for.
        """
        refused: RefusedError | None = None
        unavailable: UnavailableError | None = None
        for key in self._keys:
            name = prefix + file_name(key)
            try:
                found = self._bucket.small(name, largest(manifest.encoded))
                if found is not None:
                    require_signed(found, _signed(manifest), key, name)
                    return found
            except RefusedError as error:
                # One of them has to have signed: what lies under the name of another takes nothing from that.
                refused = error
            except UnavailableError as error:
                # Without the right to list, one that there is not is forbidden; another key may have signed.
                unavailable = error
        if unavailable is not None:
            raise unavailable
        if refused is not None:
            raise refused
        wanted = " or ".join(key_id(key) for key in self._keys)
        raise RefusedError(
            f"{prefix}: expected a signature by key {wanted}, got none: published without a key, or with another one"
        )


def _signed(manifest: Manifest) -> Signed:
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    return Signed(manifest.model, {**digests, MANIFEST: hashlib.sha256(manifest.encoded).hexdigest()})

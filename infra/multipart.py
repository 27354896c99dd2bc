"""One large file to the store in parts that are sent side by side, read once, in memory that does not grow with it.

boto3's own transfer manager cannot end an upload conditionally, and takes a file's bytes as they come.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from train_and_ship.infra.errors import ReleaseError, ShipError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_PARTS = 10_000
"""S3's limit."""


class Budget:
    """Bytes that many threads share: whoever wants more than is left waits."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._changed = threading.Condition()

    def take(self, count: int) -> int:
        """Wait for `count` bytes; more than there are in all counts as all. Returns what to give back."""
        count = min(count, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        return count

    def give_back(self, count: int) -> None:
        """Return what `take` gave."""
        with self._changed:
            self._left += count
            self._changed.notify_all()

    @contextlib.contextmanager
    def of(self, count: int) -> Iterator[None]:
        """Hold `count` bytes inside."""
        taken = self.take(count)
        try:
            yield
        finally:
            self.give_back(taken)


def require_sha256(path: Path, got: str, expected: str) -> None:
    """Raises ReleaseError unless a file that was just read has the hash it should have, both hexadecimal."""
    if got != expected:
        raise ReleaseError(f"{path}: expected SHA-256 {expected}, got {got}: it changed; nothing of it was kept")


@dataclass(frozen=True, kw_only=True)
class PartsUpload:
    """Where one file goes, and how."""

    client: S3Client
    bucket: str
    key: str
    translated: Callable[[str], AbstractContextManager[None]]
    """Turns what the client raises into this application's errors; takes what was being done, in words."""
    budget: Budget
    part_bytes: int
    parts_at_once: int
    settings: dict[str, Any]
    """For CreateMultipartUpload: metadata, encryption."""
    _failed: threading.Event = field(default_factory=threading.Event)

    def send(self, file: BinaryIO, path: Path, size: int, sha256: str, report: Callable[[int], None]) -> str:
        """Upload it. Ends with the object as a whole or without any; parts of a failed upload are deleted.

        Args:
            file: opened from `path`.
            path: for messages.
            size: of the file, bytes.
            sha256: hexadecimal, what the file has to have.
            report: called with the size of each part that arrived, from any thread.

        Returns:
            The ETag.

        Raises:
            PreconditionFailedError: the key exists by now, or the outcome has to be read.
            ReleaseError: the file is not what it should be.
        """
        target: dict[str, Any] = {"Bucket": self.bucket, "Key": self.key}
        with self.translated(f"begin to upload {self.key}"):
            upload = self.client.create_multipart_upload(**target, **self.settings)["UploadId"]
        target["UploadId"] = upload
        try:
            parts = self._send_parts(file, path, size, sha256, target, report)
            with self.translated(f"complete the upload of {self.key}"):
                ended = self.client.complete_multipart_upload(
                    **target, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
                )
        except BaseException:
            # What cannot be deleted now goes with the bucket's lifecycle rule.
            with contextlib.suppress(ShipError), self.translated(f"give up the upload of {self.key}"):
                self.client.abort_multipart_upload(**target)
            raise
        return ended["ETag"]

    def _send_parts(
        self, file: BinaryIO, path: Path, size: int, sha256: str, target: dict[str, Any], report: Callable[[int], None]
    ) -> list[Any]:
        step = max(self.part_bytes, -(-size // MAX_PARTS))
        digest = hashlib.sha256()
        sending: list[Future[Any]] = []
        with ThreadPoolExecutor(self.parts_at_once, thread_name_prefix="parts") as pool:
            for number, start in enumerate(range(0, size, step), 1):
                taken = self.budget.take(min(step, size - start))
                # Not bytes: the client library would copy those to put the headers before them.
                body = bytearray(min(step, size - start))
                if self._failed.is_set() or file.readinto(body) != len(body):  # type: ignore[attr-defined]
                    self.budget.give_back(taken)
                    break
                digest.update(body)
                sending.append(pool.submit(self._send_part, number, body, taken, target, report))
                del body
            parts = [future.result() for future in sending]
        require_sha256(path, digest.hexdigest(), sha256)
        return parts

    def _send_part(
        self, number: int, body: Any, taken: int, target: dict[str, Any], report: Callable[[int], None]
    ) -> dict[str, Any]:
        """body: a bytearray, which the client takes but its type stubs do not know."""
        try:
            if self._failed.is_set():
                return {}
            checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
            with self.translated(f"upload part {number} of {self.key}"):
                sent = self.client.upload_part(
                    **target, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum
                )
            report(len(body))
        except BaseException:
            self._failed.set()
            raise
        finally:
            self.budget.give_back(taken)
        part = {"PartNumber": number, "ETag": sent["ETag"]}
        # Where the store keeps it, it has to be said again.
        return part | ({"ChecksumSHA256": checksum} if "ChecksumSHA256" in sent else {})

"""The few reads that a reader needs from an S3 bucket. It never lists and never writes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from shipreader.errors import ReaderError, RefusedError, UnavailableError
from shipreader.records import FileEntry

CONNECT_SECONDS, READ_SECONDS = 5, 30
"""Until a connection stands; silence on it."""
ATTEMPTS = 3
"""How often in a row a file is asked for without getting any of it."""
PIECE_BYTES = 2**20


def hide_client_warnings() -> None:
    """For a command, whose log is its own: the client shows headers of objects as they are, which steer a terminal."""
    for name in ("botocore", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def s3_client(endpoint_url: str | None = None, *, read_seconds: float = READ_SECONDS, attempts: int = 2) -> Any:
    """A boto3 client with the standard chains for address, region and credentials."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Older stores know neither; every byte is held against the manifest anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.client("s3", endpoint_url=endpoint_url, config=config)
    client.meta.events.register_first("before-parse.s3.*", _without_expires)
    return client


def _without_expires(response_dict: Any, **_: Any) -> None:
    """Take away when caches forget an object: text of its writer's, of which the client library makes a date."""
    response_dict["headers"].pop("Expires", None)


class Bucket:
    """One bucket. Every method raises UnavailableError when the store does not give an answer that can be used.

    And RefusedError for an object that nobody can read: its writer's own key encrypts it, it lies in an archive, or its
    headers are too many or cannot be parsed.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self.name = client, name
        # Made on first use otherwise, and anew by each of two threads that use it first: neither catches the other's.
        _ = client.exceptions

    def small(self, key: str, limit: int) -> bytes | None:
        """A small object; None when there is none. Raises RefusedError when it is longer than `limit` bytes."""
        found = self.changed(key, None, limit)
        return None if found is None else found[0]

    def changed(self, key: str, etag: str | None, limit: int) -> tuple[bytes, str] | None:
        """Content and ETag, in one conditional GET. None when there is none.

        Raises NotModifiedError when the object still has this ETag, and RefusedError above `limit` bytes.
        """
        condition = {} if etag is None else {"IfNoneMatch": etag}
        with self._translated(key):
            try:
                reply = self._client.get_object(Bucket=self.name, Key=key, **condition)
            except self._client.exceptions.NoSuchKey:
                return None
            except self._client.exceptions.ClientError as error:
                if _status(error) == 304:
                    raise NotModifiedError from None
                raise
            with contextlib.closing(reply["Body"]) as body:
                content: bytes = body.read(limit + 1)
        if len(content) > limit:
            raise RefusedError(f"{key}: expected at most {limit:,} bytes, got more")
        return content, str(reply["ETag"])

    def download(self, key: str, path: Path, entry: FileEntry, interrupt: Callable[[], None] = lambda: None) -> None:
        """Write an object to the new file `path`, while it is no longer than the entry says.

        A transfer that breaks off goes on from there.

        Args:
            key: of the object.
            path: of the file; its folder exists.
            entry: what it has to be.
            interrupt: called for each piece; what it raises, other than UnavailableError, ends the transfer.

        Raises:
            RefusedError: more, fewer or other bytes.
            UnavailableError: the store gives no usable answer.
        """
        digest, size, fruitless = hashlib.sha256(), 0, 0
        # x: a file or a link that is there already is an error, never followed.
        with path.open("xb") as file:
            while True:
                before = size
                try:
                    # As stored: a content encoding is not undone, so nothing can unpack to more than it is.
                    for piece in self._pieces(key, size):
                        interrupt()
                        size += len(piece)
                        if size > entry.bytes:
                            raise RefusedError(
                                f"{key}: expected {entry.bytes:,} bytes, got more: altered in the bucket"
                            )
                        digest.update(piece)
                        file.write(piece)
                    break
                except UnavailableError:
                    fruitless = 0 if size > before else fruitless + 1
                    if fruitless >= ATTEMPTS:
                        raise
        if size != entry.bytes:
            raise RefusedError(f"{key}: expected {entry.bytes:,} bytes, got {size:,}: altered in the bucket")
        if digest.hexdigest() != entry.sha256:
            raise RefusedError(
                f"{key}: expected SHA-256 {entry.sha256}, got {digest.hexdigest()}: altered in the bucket"
            )

    def _pieces(self, key: str, start: int) -> Iterator[bytes]:
        where = {"Range": f"bytes={start}-"} if start else {}
        with self._translated(key):
            try:
                reply = self._client.get_object(Bucket=self.name, Key=key, **where)
            except self._client.exceptions.NoSuchKey:
                raise RefusedError(
                    f"{key}: expected a file of the release, got none: deleted from the bucket"
                ) from None
            except self._client.exceptions.ClientError as error:
                if _status(error) == 416:
                    # All of it had arrived before the connection broke, or it is shorter by now: the size tells.
                    return
                raise
            with contextlib.closing(reply["Body"]) as body:
                yield from body.iter_chunks(PIECE_BYTES)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        from botocore import exceptions as botocore
        from urllib3.exceptions import HTTPError

        try:
            yield
        except botocore.ClientError as error:
            status, code = _status(error), error.response.get("Error", {}).get("Code", "")
            hint = ""
            wrong = code in ("InvalidRequest", "InvalidArgument") or code.startswith("KMS.")
            if (status == 400 and wrong) or _forbids_to_all(error):
                # Others are read by the same request. Expired tokens and slow requests are 400 too.
                raise RefusedError(f"s3://{self.name}/{key}: it cannot be read as other objects are: {code}") from error
            if status in (401, 403):
                hint = ": it does not exist, or these credentials may not read it"
            raise UnavailableError(f"s3://{self.name}/{key}: the store answered {status} {code}{hint}") from error
        except (botocore.BotoCoreError, botocore.HTTPClientError, HTTPError, OSError) as error:
            if (many := _too_many_headers(error)) is not None:
                raise RefusedError(f"s3://{self.name}/{key}: its metadata is more than can be read: {many}") from error
            raise UnavailableError(f"s3://{self.name}/{key}: no answer: {error}") from error
        except (ReaderError, NotModifiedError):
            raise
        except Exception as error:
            # Whatever parsing ends with: the same request about others is answered.
            raise RefusedError(
                f"s3://{self.name}/{key}: it cannot be read as other objects are: {type(error).__name__}: {error}"
            ) from error


class NotModifiedError(Exception):
    """The object still has the ETag that was asked about."""


def is_forbidden(error: UnavailableError) -> bool:
    """Whether the store refused an object, and not all that these credentials ask for: they had the pointer.

    It will refuse it again, and the other files would be downloaded each time.
    """
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 403


def _forbids_to_all(error: Any) -> bool:
    """Whether a 403 is for what the object is: in an archive, or encrypted with a key that these credentials lack."""
    answer = error.response.get("Error", {})
    code, text = answer.get("Code", ""), str(answer.get("Message", "")).lower()
    # As AWS and Ceph say that it is the key which may not be used, and not the object.
    key = code == "AccessDenied" and ("kms" in text or "ciphertext" in text)
    return _status(error) == 403 and (code == "InvalidObjectState" or key)


def _too_many_headers(error: Any) -> str | None:
    """What was too much, where a reply was given up for its headers, which come of an object's metadata; else None."""
    reasons = getattr(getattr(error, "kwargs", {}).get("error"), "args", ())
    found = [str(one) for one in reasons if isinstance(one, HTTPException)]
    return next((said for said in found if said.startswith("got more than ") and "header" in said), None)


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))

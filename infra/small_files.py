"""Small files into the bucket, thousands of them: each one conditional PUT, by obstore instead of boto3.

boto3 spends 1.5 ms of CPU on such a request, obstore (Rust's object_store) a tenth of that. It sends what boto3 would
send: `If-None-Match: *`, a body that is signed with its SHA-256 and carries it as checksum and as metadata, the key of
SSE-KMS. Only success is believed: whatever else comes of a request, boto3 sends the file again, which finds out what
became of the first attempt, tries again where that helps, and explains what is wrong.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_and_ship.infra import s3
from train_and_ship.infra.errors import PreconditionFailedError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Store

SMALL_BYTES = 256 * 2**10
"""Larger files gain nothing, and a slow line takes too long for them with so many side by side."""
MOST_FAILURES = 8
"""In a row; then this way is given up."""
CREDENTIALS_MINUTES = 10
"""How long obstore keeps credentials at most. boto3's chain gives none that end sooner, unless it cannot renew them."""

# The rest of S3's names are legal too, but need escapes about which libraries do not agree.
_KEY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_BUCKET = re.compile(r"[a-z0-9.-]{3,63}")
# obstore reads them from the environment and boto3 does not: what they say would hold for small files only.
_FOREIGN = re.compile(r"AWS_(SERVER_SIDE_ENCRYPTION|SSE_.*|REQUEST_PAYER|S3_EXPRESS|SKIP_SIGNATURE|UNSIGNED_PAYLOAD)")

_log = logging.getLogger(__name__)


class SmallFiles:
    """The way into one bucket. Safe to use from many threads; opens no connection before the first file."""

    def __init__(self, connection: s3.Connection, bucket: str, kms_key_id: str | None) -> None:
        self._connection, self._bucket, self._kms_key_id = connection, bucket, kms_key_id
        self._store: S3Store | None = None
        self._failures = 0
        self._usable = _can_be_reached(connection, bucket)
        self._lock = threading.Lock()

    def put_new(self, key: str, body: bytes, sha256: str) -> str | None:
        """Create an object; its ETag, or None when it has to be sent in another way, also because this one failed.

        sha256: hexadecimal, of the body. Raises PreconditionFailedError when the key exists.
        """
        if not self._usable or not _KEY.fullmatch(key) or "." in key.split("/") or ".." in key.split("/"):
            return None
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            store = self._connected()
            written = obstore.put(store, key, body, attributes={"sha256": sha256}, mode="create")
        except AlreadyExistsError as error:
            raise PreconditionFailedError(f"{key} exists in s3://{self._bucket}") from error
        # Whatever it is, boto3 meets it too, and says it in words.
        except Exception as error:
            self._failed(error)
            return None
        self._failures = 0
        return written["e_tag"]

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            if self._usable and self._failures >= MOST_FAILURES:
                self._usable = False
                reason = str(error).partition("\n")[0]
                _log.warning("small files go to s3://%s by boto3 from now on, slower: %s", self._bucket, reason)

    def _connected(self) -> S3Store:
        with self._lock:
            if self._store is None:
                self._store = self._connect()
            return self._store

    def _connect(self) -> S3Store:
        from obstore.store import S3Store

        client = self._connection.client
        # boto3's own answer to which host, which path, and whether the bucket is in the one or the other.
        signed = client.generate_presigned_url("put_object", Params={"Bucket": self._bucket, "Key": "key"})
        base = signed.partition("?")[0].removesuffix("/key")
        in_path = base.endswith(f"/{self._bucket}")
        base = base.removesuffix(f"/{self._bucket}") if in_path else base
        region = client.meta.region_name
        options: ClientConfig = {
            "allow_http": True,
            "connect_timeout": datetime.timedelta(seconds=s3.CONNECT_SECONDS),
            "timeout": datetime.timedelta(seconds=s3.READ_SECONDS),
        }
        if self._connection.ca_bundle:
            options["root_certificate"] = Path(self._connection.ca_bundle).read_bytes()
        encryption: dict[str, Any] = {}
        if self._kms_key_id is not None:
            encryption = {"server_side_encryption": "aws:kms", "sse_kms_key_id": self._kms_key_id}
        return S3Store(
            self._bucket,
            # Both: the second is read from the environment otherwise, and goes before the first.
            endpoint=base,
            aws_endpoint_url_s3=base,
            virtual_hosted_style_request=not in_path,
            region="us-east-1" if region == "aws-global" else region,
            credential_provider=self._credentials,
            checksum_algorithm="SHA256",
            conditional_put="etag",
            client_options=options,
            retry_config={"max_retries": 0},
            **encryption,
        )

    def _credentials(self) -> Any:
        found = self._connection.credentials()
        if found is None:
            raise RuntimeError("no credentials")
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=CREDENTIALS_MINUTES)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": until,
        }


def _can_be_reached(connection: s3.Connection, bucket: str) -> bool:
    """Whether obstore is known to do there what boto3 does."""
    # The local server is slower than boto3, and proxies of the environment are not for it.
    if connection.is_local:
        return False
    # An access point or a directory bucket is signed in other ways.
    if not _BUCKET.fullmatch(bucket) or bucket.endswith("--x-s3"):
        return False
    return not any(_FOREIGN.fullmatch(name) for name in os.environ)

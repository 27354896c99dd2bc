"""The S3-compatible object store: the only module that imports boto3.

What promotion needs of a store, and how that is found out, is in `infra/store_probe.py`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from infra import leftovers
from infra.errors import PreconditionFailed, ServiceError, SettingsError, ShipError, StoreFault
from infra.multipart import Budget, PartsUpload, require_sha256
from infra.settings import Settings
from infra.store_probe import StoreTraits, probe

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 5
READ_SECONDS = 60
"""Silence on one connection, not the length of a transfer."""
ATTEMPTS = 3
"""Tries of each request inside the client library."""
CONNECTIONS = 32
MULTIPART_BYTES, PART_BYTES = 16 * 2**20, 16 * 2**20
"""Files above the first go up in parts of the second."""
LOCAL_PART_BYTES = 8 * 2**20
"""Both of these for the local server: its time for a request grows with the square of the body (64 MiB: 14 s)."""
PARTS_AT_ONCE = 4
"""Of one file, up or down."""
IN_FLIGHT_BYTES = 128 * 2**20
"""Of all that is read from files and not yet sent: what uploads add to this process, however large the files."""
QUEUED_PIECES = 16
"""Of 256 KiB, between the network and the disk for each download."""
PIECE_BYTES = 2**20
METADATA_SHA256 = "sha256"
"""User metadata of every object written here: its SHA-256, also where the store keeps no checksums."""

_LOGIN_CODES = ["AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
_TOKEN_CODES = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"]
_CREDENTIAL_CODES = frozenset([*_LOGIN_CODES, *_TOKEN_CODES])
_REGION_CODES = frozenset(["PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"])
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of this machine"


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """What HEAD says about an object."""

    bytes: int
    etag: str
    """Entity tag, in quotation marks as HTTP has it."""
    sha256: str | None
    """Hexadecimal SHA-256 that the writer claimed; None for objects that were not written here."""
    stored_sha256: str | None
    """Hexadecimal SHA-256 that the store keeps of the whole object; None where it keeps none, or for parts."""


@dataclass(frozen=True, kw_only=True)
class ListedObject:
    """What a listing says about an object."""

    bytes: int
    etag: str
    """Entity tag, in quotation marks as HTTP has it."""
    modified: datetime
    """When it was written, by the store's clock."""


class ObjectStore:
    """One bucket. Safe to use from many threads.

    Every method raises SettingsError (address, bucket or credentials are wrong) or ServiceError (the store does not
    answer, or answers with a fault); the others are named.
    """

    def __init__(
        self, client: S3Client, *, bucket: str, address: str, is_local: bool, kms_key_id: str | None = None
    ) -> None:
        """address: what messages call the store; kms_key_id: AWS KMS key that encrypts what is written."""
        self._client = client
        self.bucket = bucket
        self.address = address
        self._is_local = is_local
        self.multipart_bytes = LOCAL_PART_BYTES if is_local else MULTIPART_BYTES
        """Larger files go up in parts, which the store may not check as a whole."""
        self._part_bytes = LOCAL_PART_BYTES if is_local else PART_BYTES
        # ACLs are never sent: buckets of today have them switched off and refuse them.
        self._encryption: dict[str, Any] = (
            {} if kms_key_id is None else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id}
        )
        self._budget = Budget(IN_FLIGHT_BYTES)
        self._traits: StoreTraits | None = None
        self._probing = threading.Lock()

    @classmethod
    def from_settings(cls, settings: Settings) -> ObjectStore:
        """The store that the settings name. Opens no connection. Raises SettingsError for an impossible address."""
        endpoint, local = settings.s3_endpoint, settings.s3_is_local
        address = _without_credentials(endpoint) if endpoint else "AWS S3"
        with _translated("connect", address, settings.bucket, local):
            client = _client(endpoint, local)
        return cls(client, bucket=settings.bucket, address=address, is_local=local, kms_key_id=settings.kms_key_id)

    def __repr__(self) -> str:
        return f"ObjectStore(s3://{self.bucket} at {self.address})"

    # ---- the bucket

    def create_bucket_if_missing(self) -> None:
        """Create the bucket unless it is there already and ours."""
        with self._translated("look for the bucket"):
            try:
                self._client.head_bucket(Bucket=self.bucket)
                return
            except self._client.exceptions.ClientError as error:
                if _status(error) != 404:
                    raise
            region = self._client.meta.region_name
            where: dict[str, Any] = {}
            if region not in ("us-east-1", "aws-global"):
                where = {"CreateBucketConfiguration": {"LocationConstraint": region}}
            with contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
                self._client.create_bucket(Bucket=self.bucket, **where)

    def check(self) -> None:
        """One request: the store answers, the bucket is there, and these credentials may see it."""
        with self._translated("look for the bucket"):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except self._client.exceptions.ClientError as error:
                # HEAD has no body, so the code is only the number.
                if _status(error) == 404:
                    raise SettingsError(_no_such_bucket(self.bucket, self.address, self._is_local)) from None
                raise

    # ---- reading

    def get(self, key: str) -> tuple[bytes, str] | None:
        """A small object's content and ETag, or None when there is no such key."""
        return self._get(key, None)

    def get_if_changed(self, key: str, etag: str) -> tuple[bytes, str] | None:
        """As `get`, but None also when the object still has this ETag."""
        return self._get(key, etag)

    def get_versions(self, key: str) -> list[bytes]:
        """Contents of a small object as they were, the newest first, where the bucket keeps versions; else the last."""
        found = []
        with self._translated(f"read the versions of {key}"):
            for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=key):
                for item in page.get("Versions", []):
                    if item["Key"] != key:
                        continue
                    reply = self._client.get_object(Bucket=self.bucket, Key=key, VersionId=item["VersionId"])
                    with contextlib.closing(reply["Body"]) as body:
                        found.append(body.read())
        return found

    def head(self, key: str) -> StoredObject | None:
        """What is known about an object, or None when there is no such key."""
        with self._translated(f"look at {key}"):
            try:
                reply = self._client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        checksum = reply.get("ChecksumSHA256")
        # Of a multipart upload it is a hash of hashes, written with the number of parts behind.
        whole = checksum is not None and "-" not in checksum
        return StoredObject(
            bytes=reply["ContentLength"],
            etag=_quoted(reply["ETag"]),
            sha256=reply["Metadata"].get(METADATA_SHA256),
            stored_sha256=base64.b64decode(checksum).hex() if checksum is not None and whole else None,
        )

    def list_keys(self, prefix: str) -> dict[str, int]:
        """Every key with this prefix and its size in bytes, sorted by key."""
        return {key: listed.bytes for key, listed in self.list_objects(prefix).items()}

    def list_objects(self, prefix: str) -> dict[str, ListedObject]:
        """Every key with this prefix, sorted: one request for each thousand."""
        found = {}
        with self._translated(f"list {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    found[item["Key"]] = ListedObject(
                        bytes=item["Size"], etag=_quoted(item["ETag"]), modified=item["LastModified"]
                    )
        return dict(sorted(found.items()))

    def now(self) -> datetime:
        """The time by the store's clock, to the second; this machine's where the store does not say."""
        with self._translated("ask for the time"):
            headers = self._client.head_bucket(Bucket=self.bucket)["ResponseMetadata"]["HTTPHeaders"]
        said = headers.get("date")
        return parsedate_to_datetime(said) if said else datetime.now(UTC)

    def list_folders(self, prefix: str, begin: str = "") -> list[str]:
        """Names of the folders right below `prefix` that begin with `begin`, sorted, without the slash."""
        found = []
        with self._translated(f"list {prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix + begin, Delimiter="/"
            )
            for page in pages:
                found += [item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", [])]
        return sorted(found)

    def has_any(self, prefix: str) -> bool:
        """Whether there is any key with this prefix."""
        with self._translated(f"list {prefix}"):
            return bool(self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def hash(self, key: str) -> tuple[str, int] | None:
        """Read an object back: hexadecimal SHA-256 and size in bytes of what a reader gets; None without such a key."""
        digest = hashlib.sha256()
        size = 0
        with self._translated(f"read back {key}"):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
            except self._client.exceptions.NoSuchKey:
                return None
            with contextlib.closing(body):
                for piece in body.iter_chunks(PIECE_BYTES):
                    digest.update(piece)
                    size += len(piece)
        return digest.hexdigest(), size

    def download_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> bool:
        """Write an object to `path`; big ones in parallel ranges. False when there is no such key.

        progress: called with the number of bytes that just arrived, from any thread.
        """
        with self._translated(f"download {key}"):
            try:
                self._client.download_file(
                    self.bucket, key, str(path), Config=self._transfer_config(), Callback=progress or _no_progress
                )
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return False
                raise
        return True

    # ---- writing

    def put_new(self, key: str, body: bytes) -> str:
        """Create an object of up to a few megabytes; returns its ETag. Raises PreconditionFailed when it exists."""
        return self._put(key, body, IfNoneMatch="*")

    def replace(self, key: str, body: bytes, etag: str) -> str:
        """Replace the object that has this ETag; returns the new one.

        Raises PreconditionFailed when the object is another by now, or gone.
        """
        matched = _quoted(etag) if self.probe().etag_quoted else etag.strip('"')
        return self._put(key, body, IfMatch=matched)

    def upload_file_new(self, path: Path, key: str, sha256: str, progress: Callable[[int], None] | None = None) -> str:
        """Create an object from a file of any size whose hexadecimal SHA-256 is known; returns its ETag.

        progress: called with the number of bytes that just arrived, from any thread.

        The file is read once: what is hashed is what is sent, and nothing becomes an object unless it has that hash.
        Up to `multipart_bytes` it is one conditional PUT. Above, it goes up in parts, whose end is not conditional in
        every store: there, somebody who uploads the same key at the same time may be overwritten, so use keys whose
        content the caller knows. Raises PreconditionFailed when the key exists or the outcome has to be read,
        ReleaseError when the file has another hash, and ServiceError when the store refused a body that was damaged on
        the way.
        """
        size = path.stat().st_size
        report = progress or _no_progress
        with path.open("rb") as file:
            if size <= self.multipart_bytes:
                with self._budget.of(size):
                    body = file.read(size)
                    require_sha256(path, hashlib.sha256(body).hexdigest(), sha256)
                    etag = self._put(key, body, sha256=sha256, IfNoneMatch="*")
                report(size)
                return etag
            if self.head(key) is not None:
                raise PreconditionFailed(f"{key} exists in {self!r}")
            upload = PartsUpload(
                client=self._client,
                bucket=self.bucket,
                key=key,
                translated=self._translated,
                budget=self._budget,
                part_bytes=self._part_bytes,
                parts_at_once=PARTS_AT_ONCE,
                settings={"Metadata": {METADATA_SHA256: sha256}, "ChecksumAlgorithm": "SHA256", **self._encryption},
            )
            etag = upload.send(file, path, size, sha256, report)
        if not etag:
            # RGW 16 leaves it out of this reply.
            stored = self.head(key)
            etag = stored.etag if stored is not None else ""
        return _quoted(etag)

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with self._translated(f"delete {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def ensure_upload_rule(self, days: int) -> str:
        """Have the store drop multipart uploads that are not completed within some days; other rules stay.

        Returns what is so now, in words. Stores that cannot, and credentials that may not, are no error.
        """
        return leftovers.ensure_upload_rule(self._client, self.bucket, self._translated, days)

    def drop_uploads(self, prefix: str, older_than: timedelta, *, dry_run: bool = False) -> list[str]:
        """Abort multipart uploads below a prefix that were begun long ago; returns their keys."""
        begun_before = self.now() - older_than
        return leftovers.drop_uploads(
            self._client, self.bucket, self._translated, prefix, begun_before, dry_run=dry_run
        )

    # ---- trust

    def probe(self) -> StoreTraits:
        """Find out by trying whether conditional writes hold, once for each instance.

        Writes a few small objects under `.probe/` and deletes them; where deleting is not allowed they stay. Raises
        StoreRefused with the promise that the store does not keep.
        """
        with self._probing:
            if self._traits is None:
                self._traits = probe(self)
            return self._traits

    def put_damaged(self, key: str, body: bytes, damaged: bytes) -> None:
        """Write an object whose body becomes another of the same length on the way, after it was signed: for `probe`.

        Raises StoreFault where the store notices.
        """
        assert len(body) == len(damaged)
        events = self._client.meta.events

        def damage(request: Any, **_: Any) -> None:
            if urlsplit(request.url).path.endswith(key):
                request.body = damaged

        events.register("before-send.s3.PutObject", damage)
        try:
            self._put(key, body)
        finally:
            events.unregister("before-send.s3.PutObject", damage)

    def put_if(self, key: str, body: bytes, **condition: str) -> str:
        """A PUT under a condition spelled as boto3 has it (`IfMatch`, `IfNoneMatch`), for `probe`; the new ETag."""
        return self._put(key, body, **condition)

    # ---- below

    def _get(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        condition: dict[str, Any] = {} if etag is None else {"IfNoneMatch": _quoted(etag)}
        with self._translated(f"read {key}"):
            try:
                reply = self._client.get_object(Bucket=self.bucket, Key=key, **condition)
                with contextlib.closing(reply["Body"]) as body:
                    content = body.read()
            except self._client.exceptions.NoSuchKey:
                return None
            except self._client.exceptions.ClientError as error:
                if _status(error) == 304:
                    return None
                raise
        claimed = reply["Metadata"].get(METADATA_SHA256)
        if claimed is not None and claimed != (got := hashlib.sha256(content).hexdigest()):
            # Written with its hash, so the way back is to blame: reading again can help.
            raise ServiceError(f"read {key} from {self!r}: expected SHA-256 {claimed}, got {got}: damaged on the way")
        return content, _quoted(reply["ETag"])

    def _put(self, key: str, body: bytes, *, sha256: str | None = None, **condition: Any) -> str:
        """sha256: hexadecimal; the body's own when None."""
        sha256 = sha256 or hashlib.sha256(body).hexdigest()
        with self._translated(f"write {key}"):
            try:
                reply = self._client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=body,
                    # Named as well as given: some stores compare only then.
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(sha256)).decode(),
                    Metadata={METADATA_SHA256: sha256},
                    **self._encryption,
                    **condition,
                )
            except self._client.exceptions.NoSuchKey as error:
                # If-Match on an object that is gone.
                raise PreconditionFailed(f"cannot write {key}: it is gone") from error
        return _quoted(reply["ETag"])

    def _transfer_config(self) -> TransferConfig:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=self.multipart_bytes,
            multipart_chunksize=self._part_bytes,
            max_concurrency=PARTS_AT_ONCE,
            max_io_queue=QUEUED_PIECES,
            # The CRT client ignores endpoint_url and talks to AWS (boto3#4839).
            preferred_transfer_client="classic",
        )

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return _translated(action, self.address, self.bucket, self._is_local)


def s3_client(settings: Settings) -> S3Client:
    """A client of the store that the settings name, for a library that brings its own ways of reading."""
    return _client(settings.s3_endpoint, settings.s3_is_local)


def _client(endpoint: str | None, local: bool) -> S3Client:
    # Imported on first use: 0.3 s that commands without a store need not pay.
    import boto3
    import botocore.session
    from botocore.config import Config

    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "max_pool_connections": CONNECTIONS,
        # We send SHA-256 where a checksum matters; the default CRC32 trailer breaks older stores over TLS.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        # Over TLS the client library would not sign bodies. Stores that know no checksums compare this hash.
        "s3": {"payload_signing_enabled": True},
    }
    if not local:
        return boto3.Session().client("s3", endpoint_url=endpoint, config=Config(**options))
    # The local server knows no users: nothing of the person's own AWS profile may redirect or break it.
    nothing = {name: (None, None, None, None) for name in ("profile", "config_file", "credentials_file", "ca_bundle")}
    session = boto3.Session(
        aws_access_key_id="local",
        aws_secret_access_key="local",
        region_name="us-east-1",
        botocore_session=botocore.session.Session(session_vars=nothing),
    )
    config = Config(**options, proxies={}, use_fips_endpoint=False, use_dualstack_endpoint=False)
    return session.client("s3", endpoint_url=endpoint, config=config)


def _no_progress(count: int) -> None:
    pass


@contextlib.contextmanager
def _translated(action: str, address: str, bucket: str, local: bool) -> Iterator[None]:
    """Turn what boto3 raises into this application's errors."""
    import boto3.exceptions
    from botocore import exceptions as botocore
    from s3transfer.exceptions import S3DownloadFailedError
    from urllib3.exceptions import HTTPError

    where = f"s3://{bucket} at {address}"
    try:
        yield
    except boto3.exceptions.Boto3Error as error:
        # The transfer manager wraps the answer in text.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, botocore.ClientError):
            raise _answered(cause, action, bucket, address, local) from error
        raise ServiceError(f"cannot {action} in {where}: {error}") from error
    except botocore.ClientError as error:
        raise _answered(error, action, bucket, address, local) from error
    except (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError,
        botocore.SSOError,
        botocore.TokenRetrievalError,
    ) as error:
        raise SettingsError(f"no usable credentials for {where} ({error}); expected {_CREDENTIALS}") from error
    except botocore.SSLError as error:
        raise SettingsError(
            f"cannot {action} in {where}: TLS failed ({error}); for a private authority set AWS_CA_BUNDLE"
        ) from error
    except (botocore.ProfileNotFound, botocore.ConfigParseError, botocore.ConfigNotFound) as error:
        raise SettingsError(f"{error}; check AWS_PROFILE and AWS_CONFIG_FILE") from error
    except (botocore.ParamValidationError, botocore.InvalidRegionError, botocore.NoRegionError) as error:
        raise SettingsError(f"cannot {action} in {where}: {error}; check SHIP_BUCKET and AWS_REGION") from error
    except ValueError as error:
        if "endpoint" not in str(error):
            raise
        raise SettingsError(
            f"AWS_ENDPOINT_URL: expected an address such as https://s3.example.com, got {address!r}"
        ) from error
    except (botocore.HTTPClientError, botocore.ConnectionError) as error:
        hint = "is the local stack up? `ship up`" if local else "check AWS_ENDPOINT_URL and the network"
        reason = str(error.kwargs.get("error", error)) if isinstance(error, botocore.BotoCoreError) else str(error)
        raise ServiceError(f"cannot {action} in {where}: no answer ({reason}); {hint}") from error
    except (botocore.BotoCoreError, HTTPError, S3DownloadFailedError) as error:
        raise ServiceError(f"cannot {action} in {where}: {error}") from error


def _answered(error: Any, action: str, bucket: str, address: str, local: bool) -> ShipError:
    """The error that a fault answered by the store stands for. error: botocore's ClientError."""
    status = _status(error)
    said = error.response.get("Error", {})
    code, text = str(said.get("Code", "")), str(said.get("Message", ""))
    where = f"s3://{bucket} at {address}"
    if code == "NoSuchBucket":
        return SettingsError(_no_such_bucket(bucket, address, local))
    if code in ("BucketAlreadyExists", "InvalidBucketName"):
        return SettingsError(
            f"bucket {bucket!r} cannot be made at {address}: {code}: {text}; set SHIP_BUCKET to another"
        )
    if status in (409, 412) or code == "NoSuchUpload":
        return PreconditionFailed(f"cannot {action} in {where}: {status} {code}")
    if code in _REGION_CODES:
        return SettingsError(f"{where} is in another region ({code}: {text}); set AWS_REGION to the bucket's")
    if code in _CREDENTIAL_CODES or status in (401, 403):
        return SettingsError(
            f"{where} refused these credentials: cannot {action} ({status} {code}: {text}). "
            f"Expected credentials that may read, list and write the bucket, from {_CREDENTIALS}"
        )
    return StoreFault(f"cannot {action} in {where}: it answered {status} {code}: {text}", status=status, code=code)


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _no_such_bucket(bucket: str, address: str, local: bool) -> str:
    if local:
        return f"there is no bucket {bucket!r} at {address}: `ship up` creates it"
    return (
        f"there is no bucket {bucket!r} at {address}: create it (`aws s3api create-bucket --bucket {bucket}`), "
        "or set SHIP_BUCKET to one that exists"
    )


def _quoted(etag: str) -> str:
    return etag if etag.startswith('"') else f'"{etag}"'


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")

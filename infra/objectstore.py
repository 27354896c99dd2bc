"""The S3-compatible object store: the only module that imports boto3.

Promotion stands on two promises of a store: a PUT with `If-None-Match: *` creates or fails, and a PUT with `If-Match`
replaces exactly the object it names or fails. Some stores answer 200 and ignore both, so `probe` finds out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from infra.errors import ServiceError, SettingsError, ShipError, StoreRefused
from infra.settings import Settings

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 5
READ_SECONDS = 60
"""Silence on one connection, not the length of a transfer."""
ATTEMPTS = 3
"""Tries of each request inside the client library."""
CONNECTIONS = 32
MULTIPART_BYTES, PART_BYTES = 64 * 2**20, 32 * 2**20
"""Files above the first go up in parts of the second."""
LOCAL_PART_BYTES = 8 * 2**20
"""Both of these for the local server: its time for a request grows with the square of the body (64 MiB: 14 s)."""
PARTS_AT_ONCE = 4
PIECE_BYTES = 2**20
RACERS = 8
PROBE_PREFIX = ".probe"
METADATA_SHA256 = "sha256"
"""User metadata of every object written here: its SHA-256, also where the store keeps no checksums."""

_LOGIN_CODES = ["AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
_TOKEN_CODES = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"]
_CREDENTIAL_CODES = frozenset([*_LOGIN_CODES, *_TOKEN_CODES])
_REGION_CODES = frozenset(["PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"])
_DAMAGED_CODES = frozenset(["BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"])
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of this machine"


class PreconditionFailed(ShipError):
    """A conditional write did not happen, or its outcome has to be read: 412 or 409.

    After a reply was lost, the client's own repetition gets this answer for a write that did happen.
    """


class StoreFault(ServiceError):
    """The store answered with a fault. `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        # Any other 4xx says that the same request will never do; 501 says so too.
        self.retryable = (status >= 500 and status != 501) or status in (408, 425, 429) or code in _DAMAGED_CODES


@dataclass(frozen=True, kw_only=True)
class StoreTraits:
    """What `probe` found out about a store that keeps its promises."""

    etag_quoted: bool
    """If-Match wants the ETag in quotation marks, as HTTP says; False where only the bare one is understood."""
    checks_sha256: bool
    """A body that does not match its x-amz-checksum-sha256 is refused."""


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


class ObjectStore:
    """One bucket. Safe to use from many threads.

    Every method raises SettingsError (address, bucket or credentials are wrong) or ServiceError (the store does not
    answer, or answers with a fault); the others are named.
    """

    def __init__(self, client: S3Client, *, bucket: str, address: str, is_local: bool) -> None:
        """address: what messages call the store."""
        self._client = client
        self.bucket = bucket
        self.address = address
        self._is_local = is_local
        self.multipart_bytes = LOCAL_PART_BYTES if is_local else MULTIPART_BYTES
        """Larger files go up in parts, which the store may not check as a whole."""
        self._part_bytes = LOCAL_PART_BYTES if is_local else PART_BYTES
        self._traits: StoreTraits | None = None
        self._probing = threading.Lock()

    @classmethod
    def from_settings(cls, settings: Settings) -> ObjectStore:
        """The store that the settings name. Opens no connection. Raises SettingsError for an impossible address."""
        endpoint, local = settings.s3_endpoint, settings.s3_is_local
        address = _without_credentials(endpoint) if endpoint else "AWS S3"
        with _translated("connect", address, settings.bucket, local):
            return cls(_client(endpoint, local), bucket=settings.bucket, address=address, is_local=local)

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
        found = {}
        with self._translated(f"list {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                found.update({item["Key"]: item["Size"] for item in page.get("Contents", [])})
        return dict(sorted(found.items()))

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

    def upload_file_new(self, path: Path, key: str, sha256: str, progress: Callable[[int], None] | None = None) -> None:
        """Create an object from a file of any size whose hexadecimal SHA-256 is known.

        progress: called with the number of bytes that just left, from any thread; may run backwards when a part is
        sent again.

        Up to `multipart_bytes` this is one conditional PUT. Above, the end of a multipart upload is not conditional in
        every store, so the key is looked at first, and somebody who uploads the same key at the same time may be
        overwritten: use keys whose content the caller knows, and read back. Raises PreconditionFailed when the key
        exists, and ServiceError when the store refused a body that was damaged on the way.
        """
        size = path.stat().st_size
        if size <= self.multipart_bytes:
            # One read: what is hashed by the client library is what is sent.
            self._put(key, path.read_bytes(), sha256=sha256, IfNoneMatch="*")
            if progress:
                progress(size)
            return
        if self.head(key) is not None:
            raise PreconditionFailed(f"{key} exists in {self!r}")
        extra: dict[str, Any] = {"Metadata": {METADATA_SHA256: sha256}}
        if self.probe().checks_sha256:
            extra["ChecksumAlgorithm"] = "SHA256"
        with self._translated(f"upload {key}"):
            self._client.upload_file(
                str(path),
                self.bucket,
                key,
                ExtraArgs=extra,
                Config=self._transfer_config(),
                Callback=progress or _no_progress,
            )

    # ---- trust

    def probe(self) -> StoreTraits:
        """Find out by trying whether conditional writes hold, once for each instance.

        Writes a few small objects under `.probe/` and deletes them; where deleting is not allowed they stay. Raises
        StoreRefused with the promise that the store does not keep.
        """
        with self._probing:
            if self._traits is None:
                self._traits = self._probe()
            return self._traits

    def _probe(self) -> StoreTraits:
        prefix = f"{PROBE_PREFIX}/{uuid.uuid4().hex}/"
        keys = {name: f"{prefix}{name}" for name in ("conditions", "race", "checksum")}
        # The race needs all of its threads at the same time as the two others.
        with ThreadPoolExecutor(RACERS + 2, thread_name_prefix="probe") as pool:
            quoted = pool.submit(self._probe_conditions, keys["conditions"])
            checksum = pool.submit(self._probe_checksum, keys["checksum"])
            try:
                winners = self._probe_race(keys["race"], pool)
                traits = StoreTraits(etag_quoted=quoted.result(), checks_sha256=checksum.result())
            finally:
                # A write that is still under way would outlive its deletion.
                wait([quoted, checksum])
                for done in [pool.submit(self._delete, key) for key in keys.values()]:
                    # A bucket may forbid deletion; the probe's own verdict matters more.
                    with contextlib.suppress(ShipError):
                        done.result()
        if winners != 1:
            raise self._refused(f"{RACERS} PUTs with If-None-Match: * at the same time had {winners} winners, not 1")
        return traits

    def _probe_conditions(self, key: str) -> bool:
        """Returns whether If-Match wants the ETag quoted."""
        first = self._probe_put(key, b"1", "If-None-Match", IfNoneMatch="*")
        if first is None:
            raise self._refused("a PUT with If-None-Match: * failed although the key was new")
        if self._probe_put(key, b"2", "If-None-Match", IfNoneMatch="*") is not None:
            raise self._refused("a PUT with If-None-Match: * replaced an existing object")
        for match in (_quoted(first), first.strip('"')):
            if self._probe_put(key, b"3", "If-Match", IfMatch=match) is not None:
                break
        else:
            raise self._refused("a PUT with If-Match and the object's own ETag failed")
        # The ETag was right a moment ago: the mistake that a slow promoter makes.
        if self._probe_put(key, b"4", "If-Match", IfMatch=match) is not None:
            raise self._refused("a PUT with a stale If-Match replaced the object")
        return match.startswith('"')

    def _probe_race(self, key: str, pool: ThreadPoolExecutor) -> int:
        """Returns how many of the racers created the object."""
        start = threading.Barrier(RACERS)

        def race(racer: int) -> bool:
            start.wait(timeout=READ_SECONDS)
            return self._probe_put(key, f"{racer}".encode(), "If-None-Match", IfNoneMatch="*") is not None

        return sum(pool.map(race, range(RACERS)))

    def _probe_checksum(self, key: str) -> bool:
        """Returns whether a body that is not what its SHA-256 says is refused."""
        try:
            self._put(key, b"damaged", sha256=hashlib.sha256(b"whole").hexdigest())
        except StoreFault as fault:
            if fault.status != 400:
                raise
            return True
        return False

    def _probe_put(self, key: str, body: bytes, header: str, **condition: str) -> str | None:
        """The new ETag, or None when the condition was refused."""
        try:
            return self._put(key, body, **condition)
        except PreconditionFailed:
            return None
        except StoreFault as fault:
            if fault.status == 501:
                raise self._refused(f"it does not implement {header} on PUT") from fault
            raise

    def _refused(self, reason: str) -> StoreRefused:
        return StoreRefused(
            f"{self.address} cannot be used for promotion: {reason}. Two promotions at the same time could lose one. "
            "Use a store with conditional writes, such as AWS S3, MinIO or Ceph RGW."
        )

    # ---- below

    def _get(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        condition: dict[str, Any] = {} if etag is None else {"IfNoneMatch": _quoted(etag)}
        with self._translated(f"read {key}"):
            try:
                reply = self._client.get_object(Bucket=self.bucket, Key=key, **condition)
                with contextlib.closing(reply["Body"]) as body:
                    return body.read(), _quoted(reply["ETag"])
            except self._client.exceptions.NoSuchKey:
                return None
            except self._client.exceptions.ClientError as error:
                if _status(error) == 304:
                    return None
                raise

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
            # The CRT client ignores endpoint_url and talks to AWS (boto3#4839).
            preferred_transfer_client="classic",
        )

    def _delete(self, key: str) -> None:
        with self._translated(f"delete {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

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
    except (botocore.BotoCoreError, HTTPError) as error:
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
    if status in (409, 412):
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

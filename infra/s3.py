"""The connection to an S3-compatible store, and what its answers mean: the only module that imports boto3.

Requests go through botocore, boto3's core, and downloads of files through boto3's transfer manager, loaded when
there is one.

What is done over the connection is in `infra/objectstore.py`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from train_and_ship.infra.errors import (
    PreconditionFailedError,
    ReleaseError,
    ServiceError,
    SettingsError,
    ShipError,
    StoreFaultError,
)
from train_and_ship.infra.password import USER, read_password
from train_and_ship.infra.settings import Settings

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 5
READ_SECONDS = 60
"""Silence on one connection, not the length of a transfer."""
ATTEMPTS = 3
"""Tries of each request inside the client library."""
CONNECTIONS = 128
"""Kept open at most: those of small files that are sent at the same time."""
QUEUED_PIECES = 16
"""Of 256 KiB, between the network and the disk for each download."""

_BY_CHECKSUM = "s3v4-by-checksum"

_LOGIN_CODES = ["AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
_TOKEN_CODES = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"]
_CREDENTIAL_CODES = frozenset([*_LOGIN_CODES, *_TOKEN_CODES])
_REGION_CODES = frozenset(["PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"])
NOT_ANSWERED = (403, 404, 405, 501)
"""To a question about the bucket: these credentials may not ask it, or the store does not know it."""
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of this machine"


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A client, and what another library needs to reach the same store with the same rights."""

    client: S3Client
    credentials: Callable[[], ReadOnlyCredentials | None]
    """From the standard chain, refreshed when they are about to end; None where there are none."""
    ca_bundle: str | None
    """File of the certificates that are trusted, where the AWS settings name one."""
    is_local: bool
    """The server that `ship up` starts, which has one user."""


def connect(settings: Settings) -> Connection:
    """The store that the settings name. Opens no connection."""
    # Imported on first use: 0.3 s that commands without a store need not pay.
    import botocore.session
    from botocore.config import Config

    # It shows headers of objects as they are: whoever writes one could steer a terminal.
    for name in ("botocore", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    endpoint, local = settings.s3_endpoint, settings.s3_is_local
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
    if local:
        # Nothing of the person's own AWS profile may redirect or break it.
        names = ("profile", "config_file", "credentials_file", "ca_bundle")
        core = botocore.session.Session(session_vars={name: (None, None, None, None) for name in names})
        # Before the first `ship up` there is no password, and no server.
        core.set_credentials(USER, read_password(settings.home) or "none")
        core.set_config_variable("region", "us-east-1")
        config = Config(**options, proxies={}, use_fips_endpoint=False, use_dualstack_endpoint=False)
    else:
        core, config = botocore.session.Session(), Config(**options)

    core.register_component("data_loader", _descriptions(core.get_config_variable("data_path")))
    # Half of the time that a listing takes here goes into dates otherwise.
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_moment)

    def credentials() -> ReadOnlyCredentials | None:
        found = core.get_credentials()
        return None if found is None else found.get_frozen_credentials()

    client = cast("S3Client", core.create_client("s3", endpoint_url=endpoint, config=config))
    _sign_parts_by_checksum(client)
    client.meta.events.register_first("before-parse.s3.*", _without_expires)
    client.meta.events.register_first("before-parse.s3.*", _without_broken_markers)
    # Made on first use otherwise, and anew by each of two threads that use it first: neither catches the other's.
    _ = client.exceptions
    return Connection(
        client=client,
        credentials=credentials,
        ca_bundle=core.get_config_variable("ca_bundle"),
        is_local=local,
    )


@functools.cache
def _descriptions(folders: str | None) -> Loader:
    """botocore's descriptions of services: what it reads anew for each session is most of what a client costs."""
    from botocore.loaders import create_loader

    return create_loader(folders)


def _sign_parts_by_checksum(client: S3Client) -> None:
    """Sign each part of an upload with the SHA-256 that it carries as its checksum.

    It is the hash of the same bytes, which botocore would make again: a quarter of the CPU time of a large upload.
    """
    from botocore import auth

    class ByChecksum(auth.S3SigV4Auth):
        def payload(self, request: Any) -> str:
            checksum = request.headers.get("x-amz-checksum-sha256")
            return base64.b64decode(checksum).hex() if checksum else str(super().payload(request))

    def choose(signature_version: Any, **_: Any) -> str | None:
        # Other endpoints of AWS want other signatures.
        return _BY_CHECKSUM if signature_version in ("v4", "s3v4") else None

    auth.AUTH_TYPE_MAPS[_BY_CHECKSUM] = ByChecksum
    # An answer is asked for; the stubs know only handlers that have none.
    client.meta.events.register("choose-signer.s3.UploadPart", choose)  # type: ignore[arg-type]


def s3_client(settings: Settings) -> S3Client:
    """A client of the store that the settings name, for a library that brings its own ways of reading."""
    endpoint = settings.s3_endpoint or "AWS S3"
    with translated("reach", endpoint, settings.bucket, settings.s3_is_local):
        return connect(settings).client


def _moment(value: Any) -> datetime.datetime:
    """A moment as stores write it. value: ISO 8601, the date of an HTTP header, or seconds since 1970."""
    try:
        return datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp

        found: datetime.datetime = parse_timestamp(value)
        return found


def _without_expires(response_dict: Any, **_: Any) -> None:
    """Take away when caches forget an object: text of its writer's, of which the client library makes a date."""
    response_dict["headers"].pop("Expires", None)


_MARKER = re.compile(rb"<((?:Next)?(?:Continuation|Key|VersionId)?(?:Token|Marker)|StartAfter)>[^<]*</\1>")
"""Where a page of a listing ends or begins, as its XML has it."""


def _without_broken_markers(operation_model: Any, response_dict: Any, **_: Any) -> None:
    """Take away where a page of a listing ends, or begins, where that names a key that XML cannot hold.

    Keys are encoded because they are asked for so. These are not in every store (Ceph RGW 16), and whoever may write
    one object with a control character in its key would end every listing whose page ends there.
    """
    if operation_model.name not in ("ListObjectsV2", "ListObjectVersions"):
        return
    body = response_dict["body"]
    cleaned = _MARKER.sub(lambda found: found[0] if _is_xml(found[0]) else b"", body)
    if cleaned != body and _is_xml(cleaned):
        # The client library has made a fault of it already, as of whatever is no XML.
        response_dict["body"], response_dict["status_code"] = cleaned, 200


def _is_xml(text: bytes) -> bool:
    from xml.etree import ElementTree

    try:
        ElementTree.fromstring(text)
        return True
    except ElementTree.ParseError:
        return False


def list_pages(client: S3Client, bucket: str, prefix: str, *, delimiter: str = "", after: str = "") -> Iterator[Any]:
    """The pages of a listing, as the client has them. To be called within `translated`.

    A page that does not say where it ends is gone on with behind the last name that it has.

    Args:
        client: of the store.
        bucket: its name.
        prefix: of the keys.
        delimiter: which ends a folder's name; empty for keys.
        after: behind which key it begins; empty for the first.

    Raises:
        ServiceError: the store begins the same page again.
    """
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    if delimiter:
        asked["Delimiter"] = delimiter
    place: dict[str, Any] = {"StartAfter": after} if after else {}
    while True:
        page = client.list_objects_v2(**asked, **place)
        yield page
        if not page.get("IsTruncated"):
            return
        names = [item["Key"] for item in page.get("Contents", [])]
        names += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        last = max(names, default="")
        if (token := page.get("NextContinuationToken")) is not None:
            place = {"ContinuationToken": token}
        elif last > after:
            place = {"StartAfter": last}
        else:
            raise ServiceError(
                f"cannot list {prefix} in s3://{bucket}: the store does not say how it goes on after {last}"
            )
        after = last


class _BrokenOffError(Exception):
    """A download that ended without an answer of the store that says why."""


def download(
    client: S3Client,
    bucket: str,
    key: str,
    path: Path,
    *,
    whole: int,
    part_bytes: int,
    at_once: int,
    progress: Callable[[int], None],
    most: int | None = None,
) -> None:
    """Write an object to a file, a large one in ranges. To be called within `translated`.

    Args:
        client: of the store.
        bucket: its name.
        key: of the object.
        path: the file.
        whole: bytes up to which it comes in one piece.
        part_bytes: size of a range.
        at_once: how many ranges at the same time.
        progress: called with the number of bytes that just arrived, from any thread.
        most: bytes that the object may have; None for any number.

    Raises:
        ReleaseError: it has more.
    """
    from boto3.exceptions import Boto3Error
    from boto3.s3.transfer import S3Transfer, TransferConfig
    from botocore.exceptions import ClientError
    from s3transfer.exceptions import S3DownloadFailedError

    config = TransferConfig(
        multipart_threshold=whole,
        multipart_chunksize=part_bytes,
        max_concurrency=at_once,
        max_io_queue=QUEUED_PIECES,
        # The CRT client ignores endpoint_url and talks to AWS (boto3#4839).
        preferred_transfer_client="classic",
    )
    arrived, counting = 0, threading.Lock()

    def count(number: int) -> None:
        nonlocal arrived
        with counting:
            # Less than nothing when a range is asked for again.
            arrived += number
            if most is not None and arrived > most:
                raise ReleaseError(f"{key}: expected {most:,} bytes in bucket {bucket}, got more: it was altered there")
        progress(number)

    try:
        # The stubs know another class of that name.
        with S3Transfer(client, config) as transfer:  # type: ignore[arg-type]
            transfer.download_file(bucket, key, str(path), callback=count)
    except S3DownloadFailedError as error:
        # Also for an object that was replaced meanwhile: its cause is a refused If-Match, which is no race of ours.
        raise _BrokenOffError(str(error)) from error
    except Boto3Error as error:
        # The transfer manager wraps the answer in text.
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, ClientError) else _BrokenOffError(str(error)) from error


def status_of(error: Any) -> int:
    """The HTTP status of botocore's ClientError; 0 when it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextlib.contextmanager
def unless_missing() -> Iterator[None]:
    """Let the block end where the store answers 404; within `translated`, which sees all other answers."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if status_of(error) != 404:
            raise


@contextlib.contextmanager
def unless_unparsable() -> Iterator[None]:
    """Let the block end where an answer cannot be parsed: it names a key with a character that XML cannot hold.

    botocore makes status 500 of what it cannot parse, so a store's own 500 ends the block too: ask again.
    """
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if status_of(error) != 500:
            raise


@contextlib.contextmanager
def of_this_object(key: str) -> Iterator[None]:
    """Turn a GET or HEAD that the store calls wrong into a fault of the object: others are read by the same.

    Raises ReleaseError for one that was encrypted with a key of its writer's own, which nobody else can read, for one
    that lies in an archive (Glacier), and for one whose headers, its metadata among them, are more than can be read or
    cannot be parsed.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except HTTPClientError as error:
        if (many := too_many_headers(error)) is None:
            raise
        raise ReleaseError(f"{key}: its metadata is more than can be read: {many}") from error
    except ClientError as error:
        answer = error.response.get("Error", {})
        code = answer.get("Code", "")
        # Expired tokens and slow requests are 400 too.
        # A HEAD has no body: its code is the number.
        wrong = code in ("InvalidRequest", "InvalidArgument", "400") or code.startswith("KMS.")
        if not (status_of(error) == 400 and wrong) and not forbids_to_all(error):
            raise
        raise ReleaseError(f"{key}: it cannot be read as other objects are: {code}: {answer.get('Message')}") from error
    except (ShipError, BotoCoreError, Boto3Error, HTTPError, OSError, _BrokenOffError):
        raise
    except Exception as error:
        # Whatever parsing ends with: the same request about others is answered.
        raise ReleaseError(f"{key}: it cannot be read as other objects are: {type(error).__name__}: {error}") from error


def forbids_to_all(error: Any) -> bool:
    """Whether a 403 is for what the object is: in an archive, or encrypted with a key that these credentials lack.

    error: botocore's ClientError.
    """
    answer = error.response.get("Error", {})
    code, text = answer.get("Code", ""), str(answer.get("Message", "")).lower()
    # As AWS and Ceph say that it is the key which may not be used, and not the object.
    key = code == "AccessDenied" and ("kms" in text or "ciphertext" in text)
    return status_of(error) == 403 and (code == "InvalidObjectState" or key)


def too_many_headers(error: Any) -> str | None:
    """What was too much, where a reply was given up for its headers, which come of an object's metadata; else None.

    error: botocore's HTTPClientError, around urllib3's, around that of `http.client`.
    """
    reasons = getattr(error.kwargs.get("error"), "args", ())
    found = [str(one) for one in reasons if isinstance(one, HTTPException)]
    return next((said for said in found if said.startswith("got more than ") and "header" in said), None)


def quoted(etag: str) -> str:
    """An entity tag in quotation marks, as HTTP has it."""
    return etag if etag.startswith('"') else f'"{etag}"'


@contextlib.contextmanager
def translated(action: str, address: str, bucket: str, local: bool) -> Iterator[None]:
    """Turn what boto3 raises into this application's errors.

    Args:
        action: what is being done, in words.
        address: of the store, as messages show it.
        bucket: its name.
        local: whether it is the server that `ship up` starts.
    """
    from botocore import exceptions as botocore
    from urllib3.exceptions import HTTPError

    where = f"s3://{bucket} at {address}"
    try:
        yield
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
        if "endpoint" not in str(error) and "URL" not in str(error):
            raise
        raise SettingsError(
            f"AWS_ENDPOINT_URL: expected an address such as https://s3.example.com, got {address!r}"
        ) from error
    except (botocore.HTTPClientError, botocore.ConnectionError) as error:
        hint = "start the local stack with `ship up`" if local else "check AWS_ENDPOINT_URL and the network"
        reason = str(error.kwargs.get("error", error)) if isinstance(error, botocore.BotoCoreError) else str(error)
        raise ServiceError(f"cannot {action} in {where}: no answer ({reason}); {hint}") from error
    except (botocore.BotoCoreError, HTTPError, _BrokenOffError) as error:
        raise ServiceError(f"cannot {action} in {where}: {error}") from error


def _answered(error: Any, action: str, bucket: str, address: str, local: bool) -> ShipError:
    """The error that a fault answered by the store stands for. error: botocore's ClientError."""
    status = status_of(error)
    said = error.response.get("Error", {})
    code, text = str(said.get("Code", "")), str(said.get("Message", ""))
    where = f"s3://{bucket} at {address}"
    if code == "NoSuchBucket":
        return SettingsError(no_such_bucket(bucket, address, local))
    if code in ("BucketAlreadyExists", "InvalidBucketName"):
        return SettingsError(
            f"bucket {bucket!r} cannot be made at {address}: {code}: {text}; set SHIP_BUCKET to another"
        )
    if status in (409, 412) or code == "NoSuchUpload":
        return PreconditionFailedError(f"cannot {action} in {where}: {status} {code}")
    if code in _REGION_CODES:
        return SettingsError(f"{where} is in another region ({code}: {text}); set AWS_REGION to the bucket's")
    if local and (code in _CREDENTIAL_CODES or status in (401, 403)):
        return SettingsError(
            f"cannot {action} in {where}: it has another password than this SHIP_HOME ({status} {code}: {text}); is it "
            "the stack of another home? Else run `ship down` and `ship up`"
        )
    if code in _CREDENTIAL_CODES or status in (401, 403):
        return SettingsError(
            f"{where} refused these credentials: cannot {action} ({status} {code}: {text}). "
            f"Expected credentials that may read, list and write the bucket, from {_CREDENTIALS}"
        )
    return StoreFaultError(f"cannot {action} in {where}: it answered {status} {code}: {text}", status=status, code=code)


def no_such_bucket(bucket: str, address: str, local: bool) -> str:
    """What to do about a bucket that is not there."""
    if local:
        return f"there is no bucket {bucket!r} at {address}: `ship up` creates it"
    return (
        f"there is no bucket {bucket!r} at {address}: create it (`aws s3api create-bucket --bucket {bucket}`), "
        "or set SHIP_BUCKET to one that exists"
    )

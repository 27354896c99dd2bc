"""The S3-compatible object store: what is asked of a bucket, and what is promised about it.

The connection and its errors are in `infra/s3.py`. What promotion needs of a store, and how that is found out, is in
`infra/store_probe.py`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train_and_ship.infra import leftovers, s3
from train_and_ship.infra.addresses import without_credentials
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError, SettingsError
from train_and_ship.infra.multipart import Budget, PartsUpload, require_sha256
from train_and_ship.infra.probed import Probed
from train_and_ship.infra.s3 import quoted
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.small_files import SMALL_BYTES, SmallFiles
from train_and_ship.infra.store_probe import StoreTraits, Versioning, probe

MULTIPART_BYTES, PART_BYTES = 16 * 2**20, 16 * 2**20
"""Files above the first go up in parts of the second."""
LOCAL_PART_BYTES = 8 * 2**20
"""Both of these for the local server: its time for a request grows with the square of the body (64 MiB: 14 s)."""
PARTS_AT_ONCE = 4
"""Of one file, up or down."""
IN_FLIGHT_BYTES = 128 * 2**20
"""Of all that is read from files and not yet sent: what uploads add to this process, however large the files."""
PIECE_BYTES = 2**20
RECORD_BYTES = 2**20
"""Of a record that is read whole, where nothing else is said: a pointer, a decision, a claim. A longer one is none."""
RECORDS_BYTES = 256 * RECORD_BYTES
"""Of all records that are held at once: tens of thousands of ours."""
_log = logging.getLogger(__name__)
METADATA_SHA256 = "sha256"
"""User metadata of every object written here: its SHA-256, also where the store keeps no checksums."""


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
        self,
        connection: s3.Connection,
        *,
        bucket: str,
        address: str,
        kms_key_id: str | None = None,
        probed: Probed | None = None,
    ) -> None:
        """Opens no connection.

        Args:
            connection: a client, and the rights it has.
            bucket: its name.
            address: what messages call the store.
            kms_key_id: AWS KMS key that encrypts what is written; None leaves it to the bucket.
            probed: what other commands found out; None probes by itself.
        """
        self._connection, self._client = connection, connection.client
        self.bucket = bucket
        self.address = address
        self._is_local = is_local = connection.is_local
        self.multipart_bytes = LOCAL_PART_BYTES if is_local else MULTIPART_BYTES
        """Larger files go up in parts, which the store may not check as a whole."""
        self._part_bytes = LOCAL_PART_BYTES if is_local else PART_BYTES
        # ACLs are never sent: buckets of today have them switched off and refuse them.
        self._encryption: dict[str, Any] = (
            {} if kms_key_id is None else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id}
        )
        self._kms_key_id = kms_key_id
        self._budget = Budget(IN_FLIGHT_BYTES)
        self._probed = probed
        self._traits: StoreTraits | None = None
        self._probed_under = Versioning.UNKNOWN
        """The bucket's versioning when it was probed last, as far as somebody asked."""
        self._probing = threading.Lock()
        self._small: SmallFiles | None = None

    @classmethod
    def from_settings(cls, settings: Settings, bucket: str = "", *, short_lived: bool = False) -> ObjectStore:
        """The store that the settings name, or another bucket there. Opens no connection.

        short_lived: it may go by what another command of this machine found out lately, as `Probed` says.

        Raises SettingsError for an impossible address.
        """
        address = without_credentials(settings.s3_endpoint) if settings.s3_endpoint else "AWS S3"
        bucket = bucket or settings.bucket
        with s3.translated("connect", address, bucket, settings.s3_is_local):
            connection = s3.connect(settings)
        probed = Probed(settings.home / "probed", address, bucket) if short_lived else None
        return cls(connection, bucket=bucket, address=address, kms_key_id=settings.kms_key_id, probed=probed)

    def __repr__(self) -> str:
        return f"ObjectStore(s3://{self.bucket} at {self.address})"

    # ---- the bucket

    def create_bucket_if_missing(self) -> None:
        """Create the bucket unless it is there already and ours."""
        with self._translated("look for the bucket"):
            with s3.unless_missing():
                self._client.head_bucket(Bucket=self.bucket)
                return
            region = self._client.meta.region_name
            where: dict[str, Any] = {}
            if region not in ("us-east-1", "aws-global"):
                where = {"CreateBucketConfiguration": {"LocationConstraint": region}}
            with contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
                self._client.create_bucket(Bucket=self.bucket, **where)

    def check(self) -> None:
        """One request: the store answers, the bucket is there, and these credentials may see it."""
        with self._translated("look for the bucket"), s3.unless_missing():
            self._client.head_bucket(Bucket=self.bucket)
            return
        # HEAD has no body, so the code is only the number.
        raise SettingsError(s3.no_such_bucket(self.bucket, self.address, self._is_local))

    def versioning(self) -> Versioning:
        """Whether the bucket keeps old versions. One request; what may not be asked is UNKNOWN, which is no error."""
        with self._translated("ask for the versioning"):
            try:
                status = self._client.get_bucket_versioning(Bucket=self.bucket).get("Status")
            except self._client.exceptions.ClientError as error:
                if s3.status_of(error) not in s3.NOT_ANSWERED:
                    raise
                return Versioning.UNKNOWN
        return {"Enabled": Versioning.ON, "Suspended": Versioning.SUSPENDED}.get(status or "", Versioning.NEVER)

    # ---- reading

    def get(self, key: str, most: int = RECORD_BYTES) -> tuple[bytes, str] | None:
        """A small object's content and ETag, or None when there is no such key.

        most: bytes; whoever may write there decides how many there are, and they are held in memory.

        Raises ReleaseError for a longer one, and for one that is not what its writer said.
        """
        found = self._get(key, most)
        if found is None or found[2] is None:
            return found[:2] if found is not None else None
        # Written with its hash, so the way back may be to blame: reading again can help.
        first, _, claimed = found
        again = self._get(key, most)
        if again is None or again[2] is None:
            return again[:2] if again is not None else None
        got = hashlib.sha256(again[0]).hexdigest()
        said = f"read {key} from {self!r}: expected SHA-256 {again[2]}, as its writer said, got {got}"
        if (again[0], again[2]) == (first, claimed):
            raise ReleaseError(f"{said}, twice: it was written so")
        raise ServiceError(f"{said}: damaged on the way")

    def _get(self, key: str, most: int) -> tuple[bytes, str, str | None] | None:
        """Content, ETag, and the hash that its writer claimed where that is another; None when there is no such key."""
        with self._translated(f"read {key}"), contextlib.suppress(self._client.exceptions.NoSuchKey):
            with self._of_this_object(key):
                reply = self._client.get_object(Bucket=self.bucket, Key=key)
            content = self._body(reply, key, most)
            claimed = reply["Metadata"].get(METADATA_SHA256)
            wrong = claimed is not None and claimed != hashlib.sha256(content).hexdigest()
            return content, quoted(reply["ETag"]), claimed if wrong else None
        return None

    def _body(self, reply: Any, key: str, most: int) -> bytes:
        """The body of a reply. Raises ReleaseError above `most` bytes, of which no more are read."""
        with contextlib.closing(reply["Body"]) as body:
            length = reply.get("ContentLength")
            # Read to its end where that is known, which is when the client library notices that some is missing.
            content: bytes = body.read() if length is not None and length <= most else body.read(most + 1)
        if len(content) > most:
            raise ReleaseError(
                f"{key}: expected at most {most:,} bytes in {self!r}, got {'more' if length is None else f'{length:,}'}"
                ": nothing that long is written there by train-and-ship"
            )
        return content

    def get_versions(self, key: str, most: int = RECORD_BYTES) -> list[bytes]:
        """Contents of a small object as they were, the newest first, where the bucket keeps versions; else the last.

        most: bytes of each; longer and unreadable ones are left out, and so is what goes beyond RECORDS_BYTES in all.
        """
        found, held = [], 0
        with self._translated(f"read the versions of {key}"):
            for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=key):
                for item in page.get("Versions", []):
                    if item["Key"] != key or item["Size"] > most or held + item["Size"] > RECORDS_BYTES:
                        continue
                    held += item["Size"]
                    with contextlib.suppress(ReleaseError), self._of_this_object(key):
                        reply = self._client.get_object(Bucket=self.bucket, Key=key, VersionId=item["VersionId"])
                        found.append(self._body(reply, key, most))
        return found

    def head(self, key: str) -> StoredObject | None:
        """What is known about an object, or None when there is no such key.

        Raises ReleaseError for one that the store tells nothing about, as of_this_object in `infra/s3.py` says.
        """
        with self._translated(f"look at {key}"), s3.unless_missing(), self._of_this_object(key):
            reply = self._client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
            checksum = reply.get("ChecksumSHA256")
            # Of a multipart upload it is a hash of hashes, written with the number of parts behind.
            whole = checksum is not None and "-" not in checksum
            return StoredObject(
                bytes=reply["ContentLength"],
                etag=quoted(reply["ETag"]),
                sha256=reply["Metadata"].get(METADATA_SHA256),
                stored_sha256=base64.b64decode(checksum).hex() if checksum is not None and whole else None,
            )
        return None

    def list_keys(self, prefix: str) -> dict[str, int]:
        """Every key with this prefix and its size in bytes, sorted by key."""
        return {key: listed.bytes for key, listed in self.list_objects(prefix).items()}

    def list_objects(self, prefix: str, *, after: str = "", until: str | None = None) -> dict[str, ListedObject]:
        """Every key with this prefix, sorted: one request for each thousand, one after the other.

        after, until: only keys behind the first and up to the second, so that a long listing can be asked for in parts.
        """
        found: dict[str, ListedObject] = {}
        with self._translated(f"list {prefix}"):
            for page in s3.list_pages(self._client, self.bucket, prefix, after=after):
                for item in page.get("Contents", []):
                    if until is not None and item["Key"] > until:
                        return dict(sorted(found.items()))
                    found[item["Key"]] = ListedObject(
                        bytes=item["Size"], etag=quoted(item["ETag"]), modified=item["LastModified"]
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
            for page in s3.list_pages(self._client, self.bucket, prefix + begin, delimiter="/"):
                found += [item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", [])]
        return sorted(found)

    def has_any(self, prefix: str) -> bool:
        """Whether there is any key with this prefix."""
        with self._translated(f"list {prefix}"):
            return bool(self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def hash(self, key: str, most: int | None = None) -> tuple[str, int] | None:
        """Read an object back: hexadecimal SHA-256 and size in bytes of what a reader gets; None without such a key.

        most: bytes, after which reading ends: what is longer than it should be need not be read to its end.

        Raises ReleaseError for one that nobody can read.
        """
        digest = hashlib.sha256()
        size = 0
        with self._translated(f"read back {key}"), contextlib.suppress(self._client.exceptions.NoSuchKey):
            with self._of_this_object(key):
                reply = self._client.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(reply["Body"]) as body:
                for piece in body.iter_chunks(PIECE_BYTES):
                    digest.update(piece)
                    size += len(piece)
                    if most is not None and size > most:
                        break
            return digest.hexdigest(), size
        return None

    def download_file(
        self, key: str, path: Path, progress: Callable[[int], None] | None = None, most: int | None = None
    ) -> bool:
        """Write an object to `path`; big ones in parallel ranges. False when there is no such key.

        Args:
            key: of the object.
            path: the file.
            progress: called with the number of bytes that just arrived, from any thread.
            most: bytes that it may have, beyond which nothing is written.

        Raises:
            ReleaseError: it is longer, or nobody can read it.
        """
        with self._translated(f"download {key}"), s3.unless_missing(), self._of_this_object(key):
            s3.download(
                self._client,
                self.bucket,
                key,
                path,
                whole=self.multipart_bytes,
                part_bytes=self._part_bytes,
                at_once=PARTS_AT_ONCE,
                progress=progress or _no_progress,
                most=most,
            )
            return True
        return False

    # ---- writing

    def put_new(self, key: str, body: bytes) -> str:
        """Create an object of up to a few megabytes; returns its ETag. Raises PreconditionFailedError if it exists."""
        return self._put(key, body, IfNoneMatch="*")

    def put(self, key: str, body: bytes) -> str:
        """Write a small object over whatever is there; the new ETag."""
        return self._put(key, body)

    def replace(self, key: str, body: bytes, etag: str) -> str:
        """Replace the object that has this ETag; returns the new one.

        Raises PreconditionFailedError when the object is another by now, or gone.
        """
        matched = quoted(etag) if self.probe().etag_quoted else etag.strip('"')
        return self._put(key, body, IfMatch=matched)

    def upload_file_new(self, path: Path, key: str, sha256: str, progress: Callable[[int], None] | None = None) -> str:
        """Create an object from a file of any size whose SHA-256 is known.

        The file is read once: what is hashed is what is sent, and nothing becomes an object unless it has that hash.
        Up to `multipart_bytes` it is one conditional PUT. Above, it goes up in parts, whose end is not conditional in
        every store: there, somebody who uploads the same key at the same time may be overwritten, so use keys whose
        content the caller knows.

        Args:
            path: the file.
            key: of the object.
            sha256: hexadecimal.
            progress: called with the number of bytes that just arrived, from any thread.

        Returns:
            The ETag.

        Raises:
            PreconditionFailedError: the key exists, or the outcome has to be read.
            ReleaseError: the file has another hash.
            ServiceError: the store refused a body that was damaged on the way.
        """
        size = path.stat().st_size
        report = progress or _no_progress
        with path.open("rb") as file:
            if size <= self.multipart_bytes:
                with self._budget.of(size):
                    body = file.read(size)
                    require_sha256(path, hashlib.sha256(body).hexdigest(), sha256)
                    etag = self._put_small(key, body, sha256) if size <= SMALL_BYTES else None
                    if etag is None:
                        etag = self._put(key, body, sha256=sha256, IfNoneMatch="*")
                report(size)
                return etag
            if self.head(key) is not None:
                raise PreconditionFailedError(f"{key} exists in {self!r}")
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
        return quoted(etag)

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with self._translated(f"delete {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def ensure_upload_rule(self, days: int) -> str:
        """Have the store drop multipart uploads that are not completed within some days; other rules stay.

        Returns what is so now, in words. Stores that cannot, and credentials that may not, are no error.
        """
        return leftovers.ensure_upload_rule(self._client, self.bucket, self._translated, days)

    def drop_uploads(self, prefix: str, older_than: timedelta, *, dry_run: bool = False) -> list[tuple[str, str]]:
        """Abort multipart uploads below a prefix that were begun long ago.

        Returns their keys, each with why the store does not let go of it; empty for those that were dropped.
        """
        begun_before = self.now() - older_than
        return leftovers.drop_uploads(
            self._client, self.bucket, self._translated, prefix, begun_before, dry_run=dry_run
        )

    # ---- trust

    def probe(self) -> StoreTraits:
        """Find out by trying whether conditional writes hold, once for each instance.

        Writes a few small objects under `.probe/` and deletes them; where deleting is not allowed they stay. Raises
        StoreRefusedError with the promise that the store does not keep.
        """
        with self._probing:
            return self._known()

    def probe_again(self) -> StoreTraits:
        """As `probe`, for a process that may have probed long ago: again where the versioning may have changed since.

        Some stores keep their promises only in buckets without versions. One request more than `probe` where that has
        been called before, and none otherwise. Where versioning may not be asked, the conditions are tried each time.
        """
        with self._probing:
            if self._traits is not None:
                versioning = self.versioning()
                # There is no way back to a bucket that never had versions: it had none when it was probed, either.
                if versioning != Versioning.NEVER and (
                    versioning == Versioning.UNKNOWN or versioning != self._probed_under
                ):
                    _log.info("%s: versioning is %s; trying the conditional writes again", self, versioning)
                    self._traits, self._probed_under = None, versioning
            return self._known()

    def distrust(self) -> None:
        """For whoever has seen it break its promises: nothing that was found out before counts any more."""
        with self._probing:
            self._traits = None
            if self._probed is not None:
                self._probed.forget()

    def _known(self) -> StoreTraits:
        if self._traits is None and self._probed is not None:
            versioning = self.versioning()
            self._traits, self._probed_under = self._probed.read(versioning), versioning
        if self._traits is None:
            self._traits = probe(self)
            if self._probed is not None:
                self._probed.write(self._traits, self._probed_under)
        return self._traits

    def put_damaged(self, key: str, body: bytes, damaged: bytes, *, named: bool) -> None:
        """Write an object whose body becomes another one on the way, after it was signed: for `probe`.

        Args:
            key: of the object.
            body: what is signed.
            damaged: what is sent, of the same length.
            named: whether the request names the algorithm of the checksum that it gives.

        Raises:
            StoreFaultError: the store noticed.
        """
        assert len(body) == len(damaged)
        events = self._client.meta.events

        def damage(request: Any, **_: Any) -> None:
            if urlsplit(request.url).path.endswith(key):
                request.body = damaged

        events.register("before-send.s3.PutObject", damage)
        try:
            self._put(key, body, named=named)
        finally:
            events.unregister("before-send.s3.PutObject", damage)

    def put_if(self, key: str, body: bytes, **condition: Any) -> str:
        """A PUT under a condition spelled as boto3 has it (`IfMatch`, `IfNoneMatch`), for `probe`; the new ETag."""
        return self._put(key, body, **condition)

    # ---- below

    def _put_small(self, key: str, body: bytes, sha256: str) -> str | None:
        """Create an object in the cheap way; its ETag, or None where that is not possible or did not succeed.

        Raises PreconditionFailedError when the key exists.
        """
        traits = self._traits
        # Bodies are believed to arrive whole where the store compares them with a checksum that is not named as well.
        if traits is None or (traits.checks_bodies and not traits.checks_unnamed):
            return None
        with self._probing:
            if self._small is None:
                self._small = SmallFiles(self._connection, self.bucket, self._kms_key_id)
        return self._small.put_new(key, body, sha256)

    def _put(self, key: str, body: bytes, *, sha256: str | None = None, named: bool = True, **condition: Any) -> str:
        """sha256: hexadecimal; the body's own when None."""
        sha256 = sha256 or hashlib.sha256(body).hexdigest()
        # Named as well as given: some stores compare only then.
        naming: dict[str, Any] = {"ChecksumAlgorithm": "SHA256"} if named else {}
        with self._translated(f"write {key}"):
            try:
                reply = self._client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=body,
                    **naming,
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(sha256)).decode(),
                    Metadata={METADATA_SHA256: sha256},
                    **self._encryption,
                    **condition,
                )
            except self._client.exceptions.NoSuchKey as error:
                # If-Match on an object that is gone.
                raise PreconditionFailedError(f"cannot write {key}: it is gone") from error
        return quoted(reply["ETag"])

    @contextlib.contextmanager
    def _of_this_object(self, key: str) -> Iterator[None]:
        """As of_this_object in `infra/s3.py`, which also tells why a HEAD is refused."""
        with s3.of_this_object(key):
            try:
                yield
            except self._client.exceptions.ClientError as error:
                if s3.status_of(error) in (400, 403) and error.response["Error"].get("Code") in ("400", "403"):
                    # Only a GET says why.
                    self._client.get_object(Bucket=self.bucket, Key=key, Range="bytes=0-0")["Body"].close()
                raise

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return s3.translated(action, self.address, self.bucket, self._is_local)


def _no_progress(count: int) -> None:
    """Nobody asked."""

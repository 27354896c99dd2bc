"""Multipart uploads that were never completed: invisible in listings, and paid for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from train_and_ship.infra.errors import PreconditionFailedError, SettingsError, StoreFaultError
from train_and_ship.infra.s3 import status_of, unless_unparsable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RULE = "ship-incomplete-uploads"
"""Id of our lifecycle rule in the bucket."""

Translated = Callable[[str], contextlib.AbstractContextManager[None]]
"""Turns what boto3 raises while something is done into our errors."""


def ensure_upload_rule(client: S3Client, bucket: str, translated: Translated, days: int) -> str:
    """Have the store drop uploads by itself, as `ObjectStore.ensure_upload_rule` says.

    Args:
        client: of the store.
        bucket: its name.
        translated: turns what the client raises into our errors.
        days: after how many.

    Returns:
        What is so now, in words.
    """
    rules: list[Any] = []
    with translated("read the lifecycle rules"):
        try:
            rules = list(client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"])
        except client.exceptions.ClientError as error:
            if (status := status_of(error)) != 404:
                return f"not known: the store answers {status} to a question for its lifecycle rules"
    if any("AbortIncompleteMultipartUpload" in rule and rule["Status"] == "Enabled" for rule in rules):
        return "a rule of the bucket drops them"
    rule: Any = {
        "ID": RULE,
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
    }
    with translated("write the lifecycle rules"):
        try:
            # Replaces all of them: there is no way to add one.
            client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [*rules, rule]})
        except client.exceptions.ClientError as error:
            return f"no rule: the store answers {status_of(error)} to one; `ship gc` drops those of its models itself"
    return f"a new rule of the bucket drops them after {days} days"


def drop_uploads(
    client: S3Client, bucket: str, translated: Translated, prefix: str, begun_before: datetime, *, dry_run: bool
) -> list[tuple[str, str]]:
    """Abort old uploads, as `ObjectStore.drop_uploads` says.

    Args:
        client: of the store.
        bucket: its name.
        translated: turns what the client raises into our errors.
        prefix: below which they are looked for.
        begun_before: by the store's clock; later ones stay.
        dry_run: tell only.

    Returns:
        Their keys, each with why it stays; empty for those that were dropped.
    """
    with translated(f"list uploads below {prefix}"):
        found = None
        with unless_unparsable():
            found = list(_uploads(client, bucket, prefix, begun_before))
        if found is None:
            # Only now: stores do not say whether they have done it, and what they left as it was may look encoded.
            found = list(_uploads(client, bucket, prefix, begun_before, encoded=True))
    dropped = []
    for key, upload in found:
        why = ""
        try:
            if not dry_run:
                with translated("drop it"):
                    client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        except PreconditionFailedError:
            # Completed or dropped meanwhile.
            continue
        except (SettingsError, StoreFaultError) as error:
            # Of this one only: it may lie where somebody else writes.
            why = str(error)
        dropped.append((key, why))
    return dropped


def _uploads(
    client: S3Client, bucket: str, prefix: str, begun_before: datetime, *, encoded: bool = False
) -> Iterator[tuple[str, str]]:
    """Key and id of each old upload. encoded: have the store write keys as addresses have them."""
    asked: Any = {"Bucket": bucket, "Prefix": prefix, **({"EncodingType": "url"} if encoded else {})}
    while True:
        page = client.list_multipart_uploads(**asked)
        for item in page.get("Uploads", []):
            key = unquote_plus(item["Key"]) if encoded else item["Key"]
            # Not the marker that the store gives: some encode that too, and some do not.
            asked |= {"KeyMarker": key, "UploadIdMarker": item["UploadId"]}
            if item["Initiated"] < begun_before:
                yield key, item["UploadId"]
        if not page.get("IsTruncated") or not page.get("Uploads"):
            return

"""The job of a release as it was recorded, for who needs a part of it and not all that a job is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import read_manifest, read_small_file, told_document
from train_and_ship.registry.release.manifest import JOB


def recorded_job(store: ObjectStore, model: str, release: str, *, sha256: str) -> Mapping[str, Any]:
    """Of a release; empty for one that has none. Reads only.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        sha256: of its manifest.

    Raises:
        ReleaseError: it cannot be read, or is no object of JSON.
    """
    manifest = read_manifest(store, model, release, sha256=sha256)
    if JOB not in manifest.files:
        return {}
    try:
        document = told_document(read_small_file(store, manifest, JOB))
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"the job of release {release}: expected JSON, got: {error}") from None
    if not isinstance(document, dict):
        raise ReleaseError(f"the job of release {release}: expected an object, got {type(document).__name__}")
    return document

"""Reports of runs in the bucket: beside the release, and no part of it.

A release is sealed before it is uploaded, rehearsed, compared and decided on; its report tells about all that, and a
second run that makes the same release has another. So it lies in the release's folder without being in its manifest, as
signatures do: readers do not fetch it, and `ship gc` deletes both together. Docs: decisions/0018.
"""

from __future__ import annotations

from datetime import datetime

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import reports_prefix
from train_and_ship.registry.bucket.transfer import put_immutable


def put_report(store: ObjectStore, model: str, release: str, flow_run: str, html: str, at: datetime) -> str:
    """Writes; returns the key. at: UTC, by which the reports of several runs are in order."""
    key = f"{reports_prefix(model, release)}{at:%Y%m%dT%H%M%S.%fZ}-{flow_run}.html"
    put_immutable(store, key, html.encode(), "another report")
    return key

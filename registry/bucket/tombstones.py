"""Marks on releases that may be deleted: one small object for each, changed by conditional writes only.

    none ──mark──▶ marked ──after a grace──▶ deleting ──▶ deleted
                     ▲ │                                     │
              mark   │ ▼  claimed by a publisher or mover    ▼ published again
                     └─ kept ◀───────────────────────────────┘

Whoever publishes or promotes a release claims it first. A claim and the step to `deleting` replace the same version of
the same object, so the store lets only one of them happen. See docs/decisions/0010.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.registry.bucket.keys import tombstones_prefix
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.identity import canonical_json, is_release_id, require_release_id

SHORTEST_GRACE = timedelta(hours=1)
"""Between a mark and the deletion. Longer than any request can be under way: S3 refuses one signed 15 minutes ago."""
LEASE = timedelta(minutes=10)
"""How long one collector may go on deleting a release; after twice that another one takes over."""

_FORMAT = 1
_TRIES = 20


class State(StrEnum):
    """What has become of a release that somebody wanted to delete."""

    MARKED = "marked"
    KEPT = "kept"
    DELETING = "deleting"
    DELETED = "deleted"


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """What was last decided about a release."""

    model: str
    release: str
    state: State
    at: datetime
    """By the store's clock."""
    by: str
    nonce: str
    mlflow_done: bool = False
    """MLflow's versions of a deleted release were marked too."""
    etag: str = field(default="", compare=False)

    def encode(self) -> bytes:
        """The record as canonical JSON, without the ETag."""
        record = {**vars(self), "format": _FORMAT, "at": self.at.isoformat()}
        return canonical_json({name: value for name, value in record.items() if name != "etag"})


def boot_seconds() -> float:
    """Seconds since the machine started, those that it slept among them; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def tombstone_key(model: str, release: str) -> str:
    """Where the mark on a release lies."""
    return f"{tombstones_prefix(model)}{require_release_id(release)}.json"


def read_tombstone(store: ObjectStore, model: str, release: str) -> Tombstone | None:
    """None for a release that was never marked. Raises ReleaseError for something else under that key."""
    key = tombstone_key(model, release)
    found = store.get(key)
    return None if found is None else replace(_decode(found[0], key), etag=found[1])


def read_tombstones(store: ObjectStore, model: str) -> dict[str, Tombstone]:
    """Every mark of a model, by release."""
    keys = store.list_keys(tombstones_prefix(model))
    names = [key.removeprefix(tombstones_prefix(model)).removesuffix(".json") for key in keys]
    found = in_parallel(lambda name: read_tombstone(store, model, name), filter(is_release_id, names))
    return {stone.release: stone for stone in found if stone is not None}


def change(
    store: ObjectStore,
    old: Tombstone | None,
    *,
    model: str,
    release: str,
    state: State,
    at: datetime | None = None,
    mlflow_done: bool = False,
) -> Tombstone:
    """Replace one mark by another. Writes.

    Args:
        store: the bucket.
        old: what exactly is replaced; None creates the first mark.
        model: whose release it is.
        release: its id.
        state: what is decided.
        at: when, by the store's clock; now when None.
        mlflow_done: as in `Tombstone`.

    Raises:
        PreconditionFailedError: it is another by now.
    """
    at, nonce = at or store.now(), uuid.uuid4().hex
    new = Tombstone(model=model, release=release, state=state, at=at, by=who(), nonce=nonce, mlflow_done=mlflow_done)
    key = tombstone_key(model, release)
    try:
        etag = store.put_new(key, new.encode()) if old is None else store.replace(key, new.encode(), old.etag)
    except (PreconditionFailedError, ServiceError):
        # Ours, and only the reply was lost?
        now = read_tombstone(store, model, release)
        if now is None or now.nonce != new.nonce:
            raise
        return now
    return replace(new, etag=etag)


def claim(store: ObjectStore, model: str, release: str, *, publishing: bool) -> None:
    """Make sure that nobody deletes the release for the next hour: take a mark away. One GET where there is none.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        publishing: bytes are about to be brought, so it may have been deleted before.

    Raises:
        ReleaseError: it was deleted.
        ServiceError: it is being deleted; a ReleaseError where that cannot end well.
    """
    for _ in range(_TRIES):
        stone = read_tombstone(store, model, release)
        if stone is None or stone.state is State.KEPT:
            return
        if stone.state is State.DELETING and publishing:
            raise ServiceError(
                f"release {release} of {model} is being deleted just now, since {stone.at} by {stone.by}; when that "
                f"died, `ship gc {model} --apply` finishes it after {LEASE * 2}"
            )
        if stone.state is State.DELETING or (stone.state is State.DELETED and not publishing):
            raise ReleaseError(
                f"release {release} of {model} was deleted by `ship gc` ({stone.at}, {stone.by}); "
                "only training or publishing it again brings it back"
            )
        try:
            change(store, stone, model=model, release=release, state=State.KEPT)
            return
        except PreconditionFailedError:
            # A collector or another claimer was faster.
            continue
    raise ServiceError(
        f"release {release} of {model}: its mark changed {_TRIES} times while it was claimed; call again"
    )


def _decode(encoded: bytes, key: str) -> Tombstone:
    try:
        document = json.loads(encoded)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}")
        return Tombstone(
            model=str(document["model"]),
            release=str(document["release"]),
            state=State(document["state"]),
            at=datetime.fromisoformat(document["at"]),
            by=str(document["by"]),
            nonce=str(document["nonce"]),
            mlflow_done=bool(document["mlflow_done"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ReleaseError(f"{key}: expected the mark of a release, got {type(error).__name__}: {error}") from None

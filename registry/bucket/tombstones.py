"""Marks on releases that may be deleted, which only a collector writes, and claims of those who need a release.

    none ──mark──▶ marked ──after a grace──▶ deleting ──▶ deleted
                     ▲ │                       │             │
                mark │ ▼  needed or claimed    ▼ claimed     ▼ published again
                     └─ kept ◀─────────────────┴─────────────┘

Two small objects for each release, each with a right of its own to write it. A claimer writes its claim and then reads
the mark; a collector writes `deleting` and then reads the claim. A store that shows each write to every later read lets
at least one of them see the other, and whoever does steps back. See docs/decisions/0010.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.keys import claims_prefix, release_prefix, tombstones_prefix
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.identity import (
    canonical_json,
    is_release_id,
    json_object,
    moment,
    require_release_id,
)
from train_and_ship.registry.release.manifest import MANIFEST

SHORTEST_GRACE = timedelta(hours=1)
"""Between a mark and the deletion. Longer than any request can be under way: S3 refuses one signed 15 minutes ago."""
LEASE = timedelta(minutes=10)
"""How long one collector may go on deleting a release; after twice that another one takes over."""

CLAIM_HOLDS = timedelta(days=8)
"""How long a release is kept after it was claimed: longer than a question to a person stays open."""
SKEW = timedelta(minutes=1)
"""By how much clocks of one store may differ."""
MARK_BYTES = 64 * 2**10
"""Of a mark or a claim. A longer one is none."""

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
    modified: datetime | None = field(default=None, compare=False)
    """When the store says that it was written; None where it was not asked."""

    @property
    def token(self) -> str:
        """What a claim against this mark says, and no mark before or after it has."""
        return f"{self.state} {self.at.isoformat()}"

    def encode(self) -> bytes:
        """The record as canonical JSON, without the ETag."""
        record = {**vars(self), "format": _FORMAT, "at": self.at.isoformat()}
        return canonical_json({name: value for name, value in record.items() if name not in ("etag", "modified")})


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Somebody publishes, promotes or asks about a release. Anybody with a right to publish may write one."""

    against: str = ""
    """The token of the mark that it takes away; empty where there was none."""
    at: datetime | None = None
    """By the store's clock; None where the object says nothing that can be read."""
    by: str = ""
    modified: datetime
    """When the store says that it was written."""

    def covers(self, stone: Tombstone) -> bool:
        """Whether it was made against this mark. One that was written over counts by the time when it was."""
        newer = stone.modified is not None and self.modified > stone.modified + timedelta(seconds=1)
        return self.against == stone.token or newer


def trusted_time(said: datetime | None, modified: datetime | None, now: datetime) -> datetime:
    """When something was written: as it says itself if the store's own time allows that, else as the store says."""
    if said is not None and (modified is None or modified - SKEW <= said <= now + SKEW):
        return said
    return modified or now


def boot_seconds() -> float:
    """Seconds since the machine started, those that it slept among them; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def tombstone_key(model: str, release: str) -> str:
    """Where the mark on a release lies."""
    return f"{tombstones_prefix(model)}{require_release_id(release)}.json"


def read_tombstone(store: ObjectStore, model: str, release: str) -> Tombstone | None:
    """None for a release that was never marked. Raises ReleaseError for something else under that key."""
    key = tombstone_key(model, release)
    found = store.get(key, MARK_BYTES)
    if found is None:
        return None
    stone = _decode(found[0], key)
    if (stone.model, stone.release) != (model, release):
        raise ReleaseError(
            f"{key}: expected the mark of {model} {release}, got that of {stone.model!r} {stone.release!r}"
        )
    return replace(stone, etag=found[1])


def read_tombstones(store: ObjectStore, model: str) -> dict[str, Tombstone]:
    """Every mark of a model, by release."""
    listed = _by_release(store, tombstones_prefix(model))
    found = in_parallel(lambda name: read_tombstone(store, model, name), listed)
    return {stone.release: replace(stone, modified=listed[stone.release]) for stone in found if stone is not None}


def read_claims(
    store: ObjectStore, model: str, release: str = "", *, of: Collection[str] | None = None
) -> dict[str, Claim]:
    """The last claim of every release of a model, or of one. What cannot be read is a claim at the store's time.

    Args:
        store: the bucket.
        model: whose releases.
        release: its id; empty for all.
        of: ids; claims of others are not read, of which whoever publishes may write any number.
    """
    listed = _by_release(store, claims_prefix(model), release)

    def read(name: str) -> Claim:
        try:
            found = store.get(_claim_key(model, name), MARK_BYTES)
            document = json_object(found[0]) if found is not None else {}
            return Claim(
                against=on_one_line(str(document["against"])),
                at=moment(document["at"]),
                by=on_one_line(str(document["by"])),
                modified=listed[name],
            )
        except (ValueError, TypeError, KeyError, ReleaseError, SettingsError):
            # Also one that its writer has encrypted so that nobody else may read it.
            return Claim(modified=listed[name])

    names = [name for name in listed if of is None or name in of]
    return dict(zip(names, in_parallel(read, names), strict=True))


def _by_release(store: ObjectStore, prefix: str, release: str = "") -> dict[str, datetime]:
    """When the store says that each object was written whose name is a release's, or begins with `release`."""
    found = {
        key.removeprefix(prefix).removesuffix(".json"): item.modified
        for key, item in store.list_objects(prefix + release).items()
    }
    return {name: modified for name, modified in found.items() if is_release_id(name)}


def _claim_key(model: str, release: str) -> str:
    return f"{claims_prefix(model)}{require_release_id(release)}.json"


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


def hold(store: ObjectStore, model: str, release: str, against: str = "") -> None:
    """Say that a release is needed: it is kept for CLAIM_HOLDS. Writes one small object.

    Args:
        store: the bucket.
        model: whose release it is.
        release: its id.
        against: token of the mark that is taken away; empty for none.

    Raises:
        ServiceError: the store does not answer.
        SettingsError: these credentials may not claim releases.
    """
    said = {"format": _FORMAT, "release": release, "against": against, "by": who(), "nonce": uuid.uuid4().hex}
    body = canonical_json({**said, "at": store.now().isoformat()})
    try:
        store.put(_claim_key(model, release), body)
    except ServiceError:
        # Only the reply was lost?
        found = store.get(_claim_key(model, release))
        if found is None or found[0] != body:
            raise


def is_gone(store: ObjectStore, model: str, release: str) -> bool:
    """Whether a collector deletes a release or has deleted it, and nobody has published it again since."""
    stone = read_tombstone(store, model, release)
    if stone is None or stone.state in (State.KEPT, State.MARKED):
        return False
    return stone.state is State.DELETING or not is_published(store, model, release)


def is_published(store: ObjectStore, model: str, release: str) -> bool:
    """Whether its manifest is there, which is written last and deleted first: also after an earlier deletion.

    No claim tells this: the next one, of a question to a person, is written over the publisher's.
    """
    return store.head(release_prefix(model, release) + MANIFEST) is not None


def claim(store: ObjectStore, model: str, release: str, *, publishing: bool) -> None:
    """Make sure that nobody deletes the release for the next hour. Writes a claim where there is a mark; one GET else.

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
        if stone.state is State.DELETED and not publishing and is_published(store, model, release):
            return
        if stone.state is State.DELETING or (stone.state is State.DELETED and not publishing):
            raise ReleaseError(
                f"release {release} of {model} was deleted by `ship gc` ({stone.at}, {stone.by}); "
                "only training or publishing it again brings it back"
            )
        hold(store, model, release, stone.token)
        # A collector that has not read the claim has written before this.
        now = read_tombstone(store, model, release)
        if now is None or now.state is State.KEPT or now.token == stone.token:
            return
    raise ServiceError(
        f"release {release} of {model}: its mark changed {_TRIES} times while it was claimed; call again"
    )


def _decode(encoded: bytes, key: str) -> Tombstone:
    try:
        document = json_object(encoded)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r}")
        return Tombstone(
            model=str(document["model"]),
            release=str(document["release"]),
            state=State(document["state"]),
            at=moment(document["at"]),
            by=on_one_line(str(document["by"])),
            nonce=str(document["nonce"]),
            mlflow_done=bool(document["mlflow_done"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ReleaseError(f"{key}: expected the mark of a release, got {type(error).__name__}: {error}") from None

"""Can this store be trusted with promotion? Found out by trying, because some stores answer 200 and ignore conditions.

Promotion stands on two promises: a PUT with `If-None-Match: *` creates or fails, and a PUT with `If-Match` replaces
exactly the object it names or fails. A store may keep them in one bucket and not in another: Ceph RGW 16 keeps neither
where versioning is on.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from train_and_ship.infra.errors import PreconditionFailedError, ShipError, StoreFaultError, StoreRefusedError

if TYPE_CHECKING:
    from train_and_ship.infra.objectstore import ObjectStore

RACERS = 8
RACE_SECONDS = 60
"""Until all racers have a thread."""
PROBE_PREFIX = ".probe"


class Versioning(StrEnum):
    """Whether a bucket keeps old versions of its objects. Once switched on it can be suspended, not undone."""

    NEVER = "never switched on"
    ON = "on"
    SUSPENDED = "suspended"
    UNKNOWN = "not known"
    """These credentials may not ask, or the store does not know the question."""


@dataclass(frozen=True, kw_only=True)
class StoreTraits:
    """What `probe` found out about a store that keeps its promises."""

    etag_quoted: bool
    """If-Match wants the ETag in quotation marks, as HTTP says; False where only the bare one is understood."""
    checks_bodies: bool
    """A body that was damaged on the way is refused: by its checksum, or because it is not what was signed."""
    checks_unnamed: bool
    """The same where the request gives the checksum without naming its algorithm, as `infra/small_files.py` does."""


def probe(store: ObjectStore) -> StoreTraits:
    """Write a few small objects under `.probe/` and delete them; where deleting is not allowed they stay.

    Raises StoreRefusedError with the promise that the store does not keep.
    """
    prefix = f"{PROBE_PREFIX}/{uuid.uuid4().hex}/"
    keys = {name: f"{prefix}{name}" for name in ("conditions", "race", "damaged")}
    # The race needs all of its threads at the same time as the two others.
    with ThreadPoolExecutor(RACERS + 2, thread_name_prefix="probe") as pool:
        quoted = pool.submit(_conditions, store, keys["conditions"])
        checks = pool.submit(_checks_bodies, store, keys["damaged"])
        try:
            winners = _race(store, keys["race"], pool)
            named, unnamed = checks.result()
            traits = StoreTraits(etag_quoted=quoted.result(), checks_bodies=named, checks_unnamed=unnamed)
        finally:
            # A write that is still under way would outlive its deletion.
            wait([quoted])
            wait([checks])
            for done in [pool.submit(store.delete, key) for key in keys.values()]:
                # A bucket may forbid deletion; the probe's own verdict matters more.
                with contextlib.suppress(ShipError):
                    done.result()
    if winners != 1:
        raise _refused(store, f"{RACERS} PUTs with If-None-Match: * at the same time had {winners} winners, not 1")
    return traits


def _conditions(store: ObjectStore, key: str) -> bool:
    """Returns whether If-Match wants the ETag quoted."""
    first = _first(store, key)
    if first is None:
        raise _refused(store, "a PUT with If-None-Match: * failed although the key was new")
    if _put(store, key, b"2", "If-None-Match", IfNoneMatch="*") is not None:
        raise _refused(store, "a PUT with If-None-Match: * replaced an existing object")
    # Twice: one refusal may be the network's doing.
    for match in 2 * (first, first.strip('"')):
        if _put(store, key, b"3", "If-Match", IfMatch=match) is not None or _is(store, key, b"3"):
            break
    else:
        raise _refused(store, "a PUT with If-Match and the object's own ETag failed")
    # The ETag was right a moment ago: the mistake that a slow promoter makes.
    if _put(store, key, b"4", "If-Match", IfMatch=match) is not None:
        raise _refused(store, "a PUT with a stale If-Match replaced the object")
    return match.startswith('"')


def _first(store: ObjectStore, key: str) -> str | None:
    """The ETag of the new object, also when the reply to its PUT was lost and the repetition met it."""
    for _ in range(2):
        etag = _put(store, key, b"1", "If-None-Match", IfNoneMatch="*")
        if etag is not None:
            return etag
        found = store.get(key)
        if found is not None:
            return found[1] if found[0] == b"1" else None
    return None


def _is(store: ObjectStore, key: str, body: bytes) -> bool:
    found = store.get(key)
    return found is not None and found[0] == body


def _race(store: ObjectStore, key: str, pool: ThreadPoolExecutor) -> int:
    """Returns how many of the racers created the object."""
    start = threading.Barrier(RACERS)

    def race(racer: int) -> bool:
        start.wait(timeout=RACE_SECONDS)
        return _put(store, key, f"{racer}".encode(), "If-None-Match", IfNoneMatch="*") is not None

    winners = sum(pool.map(race, range(RACERS)))
    # The winner's reply may have been lost, and its repetition met its own object.
    return winners if winners or store.get(key) is None else 1


def _checks_bodies(store: ObjectStore, key: str) -> tuple[bool, bool]:
    """Whether damage is noticed with the algorithm named, and without."""
    return _notices_damage(store, key, named=True), _notices_damage(store, key, named=False)


def _notices_damage(store: ObjectStore, key: str, *, named: bool) -> bool:
    try:
        store.put_damaged(key, b"whole", b"whale", named=named)
    except StoreFaultError as fault:
        if fault.status != 400:
            raise
        return True
    return False


def _put(store: ObjectStore, key: str, body: bytes, header: str, **condition: str) -> str | None:
    """The new ETag, or None when the condition was refused."""
    try:
        return store.put_if(key, body, **condition)
    except PreconditionFailedError:
        return None
    except StoreFaultError as fault:
        if fault.status == 501:
            raise _refused(store, f"it does not implement {header} on PUT") from fault
        raise


def _refused(store: ObjectStore, reason: str) -> StoreRefusedError:
    return StoreRefusedError(
        f"{store.address} cannot be used for promotion: {reason}. Two promotions at the same time could lose one. "
        f"{advice(store)}"
    )


def advice(store: ObjectStore) -> str:
    """What the bucket's versioning is, and which bucket or store to use, for whoever refuses this one.

    Asks for the versioning, so that only a refusal pays for the question; raises nothing.
    """
    try:
        versioning = store.versioning()
    except ShipError as error:
        versioning = Versioning.UNKNOWN
        why = f" ({error})"
    else:
        why = ""
    return f"Versioning of bucket {store.bucket}: {versioning}{why}. {_ADVICE[versioning]}"


_USE_ANOTHER = "Use a store with conditional writes, such as AWS S3, MinIO or Ceph RGW"
_NEVER_ON = (
    "Some stores, such as Ceph RGW 16, have conditional writes only in buckets in which versioning was never switched "
    "on: use such a bucket, or a store like AWS S3, which has them in all."
)
_ADVICE = {
    Versioning.NEVER: f"{_USE_ANOTHER}.",
    # Suspending it does not help there: what was written under versioning cannot be replaced under a condition.
    Versioning.ON: _NEVER_ON,
    Versioning.SUSPENDED: _NEVER_ON,
    Versioning.UNKNOWN: f"{_USE_ANOTHER}. Some of them, such as Ceph RGW 16, have these only in buckets in "
    "which versioning was never switched on: see `aws s3api get-bucket-versioning`.",
}

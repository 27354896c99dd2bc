"""How long observations are kept: as the jobs of the releases say that are live, and then they are deleted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from shipreader.observation_files import observations_prefix
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.catalog import channels
from train_and_ship.registry.bucket.recorded_job import recorded_job
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.identity import require_name
from train_and_ship.registry.job.observe import KEEP_DAYS

LONGEST_DAYS = 3650


@dataclass
class Expired:
    """What is older than it may be."""

    days: int
    """So long observations are kept."""
    files: int = 0
    bytes: int = 0


def kept_days(store: ObjectStore, model: str) -> int:
    """The longest that a live release's job says, of all channels; `KEEP_DAYS` where none says anything.

    Raises ReleaseError when a live release's job cannot be read: nothing is to be deleted then.
    """
    said = []
    for name in channels(store, model):
        pointer = read_pointer(Channel(store, model, name))
        if pointer is None:
            continue
        job = recorded_job(store, model, pointer.release, sha256=pointer.manifest_sha256)
        said.append(_days(job.get("observe"), pointer.release))
    return max([days for days in said if days is not None], default=KEEP_DAYS)


def _days(observe: Any, release: str) -> int | None:
    if observe is None:
        return None
    days = observe.get("keep_days", KEEP_DAYS) if isinstance(observe, dict) else None
    if type(days) is not int or not 1 <= days <= LONGEST_DAYS:
        raise ReleaseError(f"the job of release {release}: observe.keep_days: expected 1 to {LONGEST_DAYS}")
    return days


def delete_expired(store: ObjectStore, model: str, *, apply: bool) -> Expired:
    """Delete what the store dates before the days that are kept; without `apply` it is only counted.

    Raises ReleaseError as `kept_days`.
    """
    found = Expired(kept_days(store, model))
    prefix, now = observations_prefix(require_name("model", model)), store.now()
    begin = now - timedelta(days=found.days)
    for folder in store.list_folders(prefix):
        if _is_kept(folder, begin, now):
            continue
        old = {key: item for key, item in store.list_objects(f"{prefix}{folder}/").items() if item.modified < begin}
        if apply:
            in_parallel(store.delete, old)
        found.files += len(old)
        found.bytes += sum(item.bytes for item in old.values())
    return found


def _is_kept(folder: str, begin: datetime, now: datetime) -> bool:
    """Whether all of a day is younger, so that it need not be listed. Its writers' clocks may be a day wrong."""
    try:
        day = datetime.combine(date.fromisoformat(folder), datetime.min.time(), UTC)
    except ValueError:
        return False
    return begin + timedelta(days=1) < day <= now + timedelta(days=1)

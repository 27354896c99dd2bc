"""Which releases may go, and their deletion in two phases: marked first, deleted after a grace.

A release is kept while it is live or being rolled out on any channel, was among the last ones of a channel, is named by
a view, or was live, published or claimed less than the slowest reader takes. Of a mark only that is believed which the
store bears out, and no mark deletes a release that is needed. Safe beside promotions: see
registry/bucket/tombstones.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, RequestError, SettingsError
from train_and_ship.infra.objectstore import RECORD_BYTES, ListedObject, ObjectStore
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import channels
from train_and_ship.registry.bucket.keys import (
    history_prefix,
    in_release,
    is_view_config,
    release_prefix,
    releases_prefix,
    views_prefix,
)
from train_and_ship.registry.bucket.tombstones import (
    CLAIM_HOLDS,
    LEASE,
    SHORTEST_GRACE,
    Claim,
    State,
    Tombstone,
    boot_seconds,
    change,
    is_published,
    read_claims,
    read_tombstone,
    read_tombstones,
    trusted_time,
)
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record, generations_in, record_key
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.timeline import moved_at
from train_and_ship.registry.identity import is_release_id
from train_and_ship.registry.release.manifest import MANIFEST
from train_and_ship.registry.rollouts.moves import running
from train_and_ship.registry.tracking.rest import model_registry

TAG_DELETED = "deleted_from_bucket"
"""Tag of a version in MLflow whose release is gone: when it went, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is kept."""

    keep_last: int = 5
    """Releases of each channel, the live one among them."""
    slowest_reader: timedelta = timedelta(days=7)
    """How long after it went off, or was published, somebody may still read a release."""
    grace: timedelta = timedelta(days=1)
    """Between the mark and the deletion."""

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise RequestError(
                f"keep: expected at least 2, the live release and one to go back to, got {self.keep_last}"
            )
        if self.grace < SHORTEST_GRACE:
            raise RequestError(f"grace: expected at least {SHORTEST_GRACE}, got {self.grace}")


class Step(StrEnum):
    """What is to be done with a release."""

    KEEP = "keep"
    UNMARK = "unmark"
    MARK = "mark"
    WAIT = "marked"
    DELETE = "delete"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one release, and why."""

    release: str
    step: Step
    why: str
    bytes: int
    """Size of all its objects in the bucket."""
    stone: Tombstone | None


def decide(store: ObjectStore, model: str, policy: Policy) -> list[Decision]:
    """What a collector would do with every release now. Reads only.

    Raises ReleaseError when a history has a hole where it matters: then nobody can tell what has to be kept.
    """
    now = store.now()
    objects: dict[str, dict[str, ListedObject]] = {}
    for key, item in store.list_objects(releases_prefix(model)).items():
        # What is of no release is no release to delete: `ship doctor` tells of it.
        if (found := in_release(model, key)) is not None:
            objects.setdefault(found[0], {})[found[1]] = item
    # Before the pointers: whatever claims a release after this is seen when it is deleted.
    stones, claims = read_tombstones(store, model), read_claims(store, model, of=objects)
    needed = _needed(store, model, policy, now)
    return [
        _decision(release, items, stones.get(release), claims.get(release), needed.get(release), policy, now)
        for release, items in sorted(objects.items())
    ]


def _decision(
    release: str,
    items: Mapping[str, ListedObject],
    stone: Tombstone | None,
    claim: Claim | None,
    needed: str | None,
    policy: Policy,
    now: datetime,
) -> Decision:
    def of(step: Step, why: str) -> Decision:
        return Decision(
            release=release, step=step, why=why, bytes=sum(item.bytes for item in items.values()), stone=stone
        )

    state = stone.state if stone is not None else None
    at = trusted_time(stone.at, stone.modified, now) if stone is not None else now
    newest = max(item.modified for item in items.values())
    if state is State.KEPT:
        newest = max(newest, at)
    if stone is not None and state is State.DELETING:
        if now - at < 2 * LEASE:
            return of(Step.WAIT, f"being deleted since {at:%Y-%m-%d %H:%M:%S} by {stone.by}")
        if needed is None:
            return of(Step.DELETE, f"its deletion was begun {at:%Y-%m-%d %H:%M:%S} by {stone.by} and not finished")
    if needed is not None:
        # A mark that says otherwise is wrong, whoever wrote it: nobody could go back to the release while it stands.
        wrong = state in (State.MARKED, State.DELETING) or (state is State.DELETED and MANIFEST in items)
        return of(Step.UNMARK if wrong else Step.KEEP, needed)
    if now - newest < policy.slowest_reader:
        return of(Step.KEEP, f"published {_ago(now - newest)} ago")
    if claim is not None:
        claimed = now - trusted_time(claim.at, claim.modified, now)
        if claimed < max(policy.slowest_reader, CLAIM_HOLDS):
            return of(Step.KEEP, f"claimed {_ago(claimed)} ago by {claim.by or 'somebody'}")
    if stone is None or state is not State.MARKED or (claim is not None and claim.covers(stone)):
        complete = MANIFEST in items
        return of(Step.MARK, f"{'' if complete else 'incomplete, '}published {_ago(now - newest)} ago, on no channel")
    left = policy.grace - (now - at)
    if left > timedelta(0):
        return of(Step.WAIT, f"may be deleted in {_ago(left)}")
    return of(Step.DELETE, f"marked {_ago(now - at)} ago")


def _needed(store: ObjectStore, model: str, policy: Policy, now: datetime) -> dict[str, str]:
    """Why each release has to stay, by release."""
    needed: dict[str, str] = {}
    for channel in (Channel(store, model, name) for name in channels(store, model)):
        last: set[str] = set()
        later: Pointer | None = None
        written = _written(channel)
        for move in _newest_first(channel):
            if later is None:
                needed[move.release] = f"live on {channel.name}"
                recent = True
            else:
                off = moved_at(later)
                # Of a record that was rebuilt nobody knows when. A mover's word counts where the store bears it out.
                recent = (
                    off is None or now - trusted_time(off, written.get(later.generation), now) < policy.slowest_reader
                )
                if later.previous is not None and later.previous != move.release:
                    # Two records that contradict each other: nobody could go back to what only one of them names.
                    needed.setdefault(later.previous, f"replaced by generation {later.generation} of {channel.name}")
            if len(last) < policy.keep_last:
                last.add(move.release)
                needed.setdefault(move.release, f"among the last {policy.keep_last} of {channel.name}")
            elif recent:
                needed.setdefault(move.release, f"still live on {channel.name} less than {policy.slowest_reader} ago")
            else:
                break
            later = move
        if (rollout := running(channel)) is not None:
            needed.setdefault(rollout.release, f"being rolled out on {channel.name}")
    for release, view in _in_views(store, model):
        needed.setdefault(release, f"named by {view}")
    return needed


def _written(channel: Channel) -> dict[int, datetime]:
    """When the store says that the record of each move was written."""
    prefix = history_prefix(channel.model, channel.name)
    listed = channel.store.list_objects(prefix)
    keys = {number: record_key(channel.model, channel.name, number) for number in generations_in(prefix, listed)}
    return {number: listed[key].modified for number, key in keys.items()}


def _in_views(store: ObjectStore, model: str) -> Iterator[tuple[str, str]]:
    """Releases that other servers' repositories name (`ship view`), each with the configuration that does."""
    listed = store.list_keys(views_prefix(model))
    keys = [key for key, size in listed.items() if size <= RECORD_BYTES and is_view_config(model, key)]
    # Of each only the id is kept: they may be a MiB long, and any number.
    for key, release in zip(keys, in_parallel(lambda key: _release_in(store, key), keys), strict=True):
        if release is not None:
            yield release, on_one_line(key)


def _release_in(store: ObjectStore, key: str) -> str | None:
    """None for what is no configuration of ours: whoever writes views can have them name nothing in any case."""
    try:
        found = store.get(key)
    except (ReleaseError, SettingsError):
        return None
    named = re.match(rb"# \S+ release (\S+)\n", found[0]) if found is not None else None
    release = named[1].decode(errors="replace") if named is not None else ""
    return release if is_release_id(release) else None


def _newest_first(channel: Channel) -> Iterator[Pointer]:
    """The moves of a channel, read as far back as they are asked for."""
    move = read_pointer(channel)
    if move is None:
        raise ReleaseError(
            f"{channel}: nothing is live, and its history is not empty; what has to be kept cannot be told. "
            f"`ship doctor {channel.model}` says more"
        )
    yield move
    while move.generation > 1:
        before = find_record(channel, move.generation - 1)
        if before is None:
            raise ReleaseError(
                f"{channel}: the record of generation {move.generation - 1} is lost; what has to be kept "
                f"cannot be told. `ship doctor {channel.model}` rebuilds what can be"
            )
        move = before
        yield move


def carry_out(store: ObjectStore, model: str, decision: Decision, policy: Policy) -> str | None:
    """Do what was decided. Writes.

    Args:
        store: the bucket.
        model: whose release it is.
        decision: of `decide`.
        policy: that it was decided by; before a deletion it is asked once more.

    Returns:
        Why it was not done, when somebody needed the release meanwhile.

    Raises:
        ReleaseError: as `decide`; nothing of the release is deleted then.
    """
    stone = decision.stone
    try:
        match decision.step:
            case Step.MARK | Step.UNMARK:
                state = State.MARKED if decision.step is Step.MARK else State.KEPT
                change(store, stone, model=model, release=decision.release, state=state)
            case Step.DELETE:
                return _delete(store, model, decision.release, stone, policy)
            case Step.KEEP | Step.WAIT:
                pass
    except PreconditionFailedError:
        now = read_tombstone(store, model, decision.release)
        return f"changed meanwhile: {now.state} by {now.by}" if now is not None else "its mark is gone"
    return None


def _delete(store: ObjectStore, model: str, release: str, marked: Tombstone | None, policy: Policy) -> str | None:
    began = boot_seconds()
    # From here on nobody can claim it.
    stone = change(store, marked, model=model, release=release, state=State.DELETING)
    claim = read_claims(store, model, release).get(release)
    if claim is not None and marked is not None and claim.covers(marked):
        change(store, stone, model=model, release=release, state=State.KEPT)
        return f"claimed meanwhile by {claim.by or 'somebody'}"
    try:
        needed = _needed(store, model, policy, store.now()).get(release)
    except ReleaseError:
        change(store, stone, model=model, release=release, state=State.KEPT)
        raise
    if needed is not None:
        change(store, stone, model=model, release=release, state=State.KEPT)
        return f"{needed} meanwhile"
    prefix = release_prefix(model, release)
    # The manifest first: without it there is no release, only files.
    names = sorted(store.list_keys(prefix), key=lambda key: (key != prefix + MANIFEST, key))
    for key in names:
        if boot_seconds() - began > LEASE.total_seconds():
            return f"not finished within {LEASE}; the next run goes on"
        store.delete(key)
    change(store, stone, model=model, release=release, state=State.DELETED)
    return None


def _ago(span: timedelta) -> str:
    """A span in its two largest units: `3 d 4 h`."""
    seconds = int(span.total_seconds())
    units: Mapping[str, int] = {"d": 86_400, "h": 3600, "min": 60, "s": 1}
    parts: list[str] = []
    for unit, size in units.items():
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size} {unit}")
            seconds %= size
    return " ".join(parts[:2])


def notify_mlflow(store: ObjectStore, model: str, tracking_uri: str, *, delete_versions: bool) -> Iterator[str]:
    """Tag MLflow's versions of deleted releases, or delete them; says what was done. Writes, and can be repeated.

    Args:
        store: the bucket.
        model: whose versions.
        tracking_uri: MLflow's.
        delete_versions: delete them; one that has an alias is tagged all the same.

    Raises:
        SettingsError: MLflow denies access.
        ServiceError: MLflow does not do what is asked: what is left is done by the next call.
    """
    registry = model_registry(tracking_uri)
    for stone in read_tombstones(store, model).values():
        if stone.state is not State.DELETED or (stone.mlflow_done and not delete_versions):
            continue
        if is_published(store, model, stone.release):
            continue
        versions = registry.versions(model, stone.release)
        named = set(registry.aliases(model).values()) if versions and delete_versions else set()
        for version in versions:
            if delete_versions and version not in named:
                registry.delete_version(model, version)
                yield f"MLflow: version {version} deleted (release {stone.release})"
            elif not stone.mlflow_done:
                registry.set_tag(model, version, TAG_DELETED, stone.at.isoformat())
                yield f"MLflow: version {version} tagged {TAG_DELETED} (release {stone.release})"
        if not stone.mlflow_done:
            # Another collector did the same, or the release was published again.
            with contextlib.suppress(PreconditionFailedError):
                change(
                    store, stone, model=model, release=stone.release, state=stone.state, at=stone.at, mlflow_done=True
                )

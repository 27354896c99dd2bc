"""MLflow's aliases follow the pointers of the channels.

`champion` and `previous` for prod, `staging` and `staging-previous` for a channel of that name, and so on. The pointer
decides and never waits for MLflow. Whoever sets an alias looks at the pointer again afterwards, so however
many movers do this at once, the last alias set is that of the last pointer. An alias is set over what it was and never
deleted: readers of `models:/<model>@champion` see no gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from train_and_ship.infra.errors import AnsweredError, ReleaseError, ServiceError, SettingsError, ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.catalog import channels, models
from train_and_ship.registry.channels.channel import PRODUCTION, Channel
from train_and_ship.registry.channels.history import find_record
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.identity import may_be_alias
from train_and_ship.registry.tracking.rest import ModelRegistry, model_registry

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ROUNDS = 20
"""How often the pointer may have moved again while the aliases were set."""


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What was done to the aliases of a model, in words."""

    changed: tuple[str, ...] = ()
    """Aliases that were set, or would be."""
    missing: tuple[str, ...] = ()
    """Aliases that cannot be right: MLflow has no version of the release, or cannot have such an alias."""
    failed: tuple[str, ...] = ()
    """Channels whose aliases could not be looked at or set, and why."""

    def __add__(self, other: Synced) -> Synced:
        return Synced(
            changed=self.changed + other.changed,
            missing=self.missing + other.missing,
            failed=self.failed + other.failed,
        )


def alias_of(channel: str) -> str:
    """The MLflow alias of what is live on a channel: `champion` for prod, else the channel's own name."""
    return CHAMPION if channel == PRODUCTION else channel


def previous_alias_of(channel: str) -> str:
    """The MLflow alias of what was live on a channel before: `previous` for prod, else with the channel's name."""
    return PREVIOUS if channel == PRODUCTION else f"{channel}-{PREVIOUS}"


def sync_aliases(channel: Channel, *, dry_run: bool = False) -> Synced:
    """Set the aliases of a channel to what its pointer says. Writes to MLflow, and can be repeated.

    Raises ServiceError or SettingsError when MLflow, or the bucket, does not do what is asked.
    """
    pointer = read_pointer(channel)
    if not may_be_alias(channel.name):
        why = "MLflow has no alias with a dot in its name" if "." in channel.name else "that name is no channel's"
        told = f"{channel}: {why}, so none follows this channel"
        return Synced(missing=(told,) if pointer is not None else ())
    registry = model_registry(channel.tracking_uri)
    done = Synced()
    for _ in range(ROUNDS):
        if pointer is None:
            return done
        done += _set(registry, channel, pointer, dry_run)
        again = read_pointer(channel)
        if dry_run or again == pointer:
            return done
        pointer = again
    raise ServiceError(f"{channel}: it moved {ROUNDS} times while its MLflow aliases were set; call again")


def sync_after_move(channel: Channel) -> list[str]:
    """As `sync_aliases`, after a move: returns warnings instead of raising, for the move has taken place."""
    try:
        done = sync_aliases(channel)
    except (ServiceError, SettingsError, ReleaseError) as error:
        return [
            f"the MLflow alias {alias_of(channel.name)} follows later, with the next move or `ship doctor`: {error}"
        ]
    return list(done.missing)


def sync_all_aliases(store: ObjectStore, tracking_uri: str) -> Synced:
    """Set the aliases of every channel of every model. What is wrong with one channel keeps no other from it.

    Raises as `sync_aliases`, for what would be in the way of all: bucket or MLflow do not answer, or deny access.
    """
    done = Synced()
    for model in models(store):
        for name in channels(store, model):
            try:
                done += sync_aliases(Channel(store, model, name, tracking_uri))
            except (ReleaseError, AnsweredError) as error:
                done += Synced(failed=(f"the aliases of {model} {name} were not set: {error}",))
    return done


def set_challenger(channel: Channel, version: str) -> list[str]:
    """Name a refused candidate in MLflow; returns warnings, for the refusal is what matters."""
    try:
        model_registry(channel.tracking_uri).set_alias(channel.model, CHALLENGER, version)
    except ShipError as error:
        return [f"version {version} of {channel.model} could not be named {CHALLENGER} in MLflow: {error}"]
    return []


def version_of(registry: ModelRegistry, model: str, release: str, recorded: str) -> str | None:
    """The version that holds a release: the one in the record of its move while that exists, else the newest.

    Args:
        registry: MLflow's.
        model: the registered model.
        release: id of the release.
        recorded: the version that the record of the move names; empty when it names none.
    """
    if recorded and registry.release(model, recorded) == release:
        return recorded
    return next(iter(registry.versions(model, release)), None)


def _set(registry: ModelRegistry, channel: Channel, pointer: Pointer, dry_run: bool) -> Synced:
    model = channel.model
    wanted: dict[str, tuple[str, str]] = {alias_of(pointer.channel): (pointer.release, pointer.mlflow_version)}
    if pointer.previous is not None:
        wanted[previous_alias_of(pointer.channel)] = (pointer.previous, _version_before(channel, pointer))
    present: Mapping[str, str] = registry.aliases(model)
    changed, missing = [], []
    for alias, (release, recorded) in wanted.items():
        now = present.get(alias)
        if now is not None and now == recorded:
            continue
        version = version_of(registry, model, release, recorded)
        if version is None:
            still = f"; it says version {now}" if now else ""
            missing.append(f"alias {alias} of {model}: MLflow has no version of release {release}{still}")
        elif version != now:
            if not dry_run:
                registry.set_alias(model, alias, version)
            changed.append(f"alias {alias} of {model}: version {now or 'none'} → {version} (release {release})")
    return Synced(changed=tuple(changed), missing=tuple(missing))


def _version_before(channel: Channel, pointer: Pointer) -> str:
    """MLflow version in the record of the move that `pointer` replaced; empty when that is lost."""
    before = find_record(channel, pointer.generation - 1)
    return before.mlflow_version if before is not None and before.release == pointer.previous else ""

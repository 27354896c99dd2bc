"""MLflow's aliases follow the pointers of the channels.

`champion` and `previous` for prod, `staging` and `staging-previous` for a channel of that name, and so on. The pointer
decides and never waits for MLflow. Whoever sets an alias looks at the pointer again afterwards, so however
many movers do this at once, the last alias set is that of the last pointer. An alias is set over what it was and never
deleted: readers of `models:/<model>@champion` see no gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from train_and_ship.infra.errors import ReleaseError, ServiceError, SettingsError, ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.catalog import channels, models
from train_and_ship.registry.channels.history import find_record
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.tracking.rest import ModelRegistry, model_registry

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
PRODUCTION = "prod"
ROUNDS = 20
"""How often the pointer may have moved again while the aliases were set."""


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """What was done to the aliases of a model, in words."""

    changed: tuple[str, ...] = ()
    """Aliases that were set, or would be."""
    missing: tuple[str, ...] = ()
    """Aliases that cannot be right, because MLflow has no version of the release."""

    def __add__(self, other: Mirrored) -> Mirrored:
        return Mirrored(changed=self.changed + other.changed, missing=self.missing + other.missing)


def alias_of(channel: str) -> str:
    """The MLflow alias that mirrors a channel: `champion` for prod, else the channel's own name."""
    return CHAMPION if channel == PRODUCTION else channel


def previous_alias_of(channel: str) -> str:
    """The MLflow alias of what was live on a channel before: `previous` for prod, else with the channel's name."""
    return PREVIOUS if channel == PRODUCTION else f"{channel}-{PREVIOUS}"


def mirror_channel(
    store: ObjectStore, model: str, channel: str, tracking_uri: str, *, dry_run: bool = False
) -> Mirrored:
    """Set the aliases of a channel to what its pointer says. Writes to MLflow, and can be repeated.

    Raises ServiceError or SettingsError when MLflow, or the bucket, does not do what is asked.
    """
    registry = model_registry(tracking_uri)
    done = Mirrored()
    pointer = read_pointer(store, model, channel)
    for _ in range(ROUNDS):
        if pointer is None:
            return done
        done += _set(registry, store, pointer, dry_run)
        again = read_pointer(store, model, channel)
        if dry_run or again == pointer:
            return done
        pointer = again
    raise ServiceError(f"{model} {channel}: it moved {ROUNDS} times while its MLflow aliases were set; call again")


def follow(store: ObjectStore, model: str, channel: str, tracking_uri: str) -> list[str]:
    """As `mirror_channel`, after a move: returns warnings instead of raising, for the move has taken place."""
    try:
        done = mirror_channel(store, model, channel, tracking_uri)
    except (ServiceError, SettingsError, ReleaseError) as error:
        return [f"the MLflow alias {alias_of(channel)} follows later, with the next move or `ship doctor`: {error}"]
    return list(done.missing)


def mirror_all(store: ObjectStore, tracking_uri: str, names: Iterable[str] | None = None) -> Mirrored:
    """Set the aliases of every channel of every model, or of these. Raises as `mirror_channel`."""
    done = Mirrored()
    for model in models(store) if names is None else names:
        for channel in channels(store, model):
            done += mirror_channel(store, model, channel, tracking_uri)
    return done


def set_challenger(model: str, version: str, tracking_uri: str) -> list[str]:
    """Name a refused candidate in MLflow; returns warnings, for the refusal is what matters."""
    try:
        model_registry(tracking_uri).set_alias(model, CHALLENGER, version)
    except ShipError as error:
        return [f"version {version} of {model} could not be named {CHALLENGER} in MLflow: {error}"]
    return []


def version_of(registry: ModelRegistry, model: str, release: str, recorded: str) -> str | None:
    """The version that holds a release: the one in the record of its move while that exists, else the newest."""
    if recorded and registry.release(model, recorded) == release:
        return recorded
    return next(iter(registry.versions(model, release)), None)


def _set(registry: ModelRegistry, store: ObjectStore, pointer: Pointer, dry_run: bool) -> Mirrored:
    model = pointer.model
    wanted: dict[str, tuple[str, str]] = {alias_of(pointer.channel): (pointer.release, pointer.mlflow_version)}
    if pointer.previous is not None:
        wanted[previous_alias_of(pointer.channel)] = (pointer.previous, _version_before(store, pointer))
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
    return Mirrored(changed=tuple(changed), missing=tuple(missing))


def _version_before(store: ObjectStore, pointer: Pointer) -> str:
    """MLflow version in the record of the move that `pointer` replaced; empty when that is lost."""
    before = find_record(store, pointer.model, pointer.channel, pointer.generation - 1)
    return before.mlflow_version if before is not None and before.release == pointer.previous else ""

"""What there is in the bucket: models, their channels and releases. Reads only.

What has another name than one of ours can have was put there by somebody else and is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import channels_prefix, histories_prefix, releases_prefix
from train_and_ship.registry.identity import is_name, is_release_id, require_name


@dataclass(frozen=True)
class Named:
    """A release, and what is known of its description.

    Files make the id. What the manifest says of them is whoever's who may write releases, so whoever reads it holds it
    to the hash that is here.
    """

    release: str
    manifest_sha256: str = ""
    """Hexadecimal SHA-256 of its manifest, as a record of a move has it; empty for what was never live."""


def models(store: ObjectStore) -> list[str]:
    """Every model that has anything in the bucket, sorted."""
    return [name for name in store.list_folders("models/") if is_name(name)]


def require_model(store: ObjectStore, model: str) -> None:
    """Raises RequestError naming the models there are unless this is one of them."""
    require_name("model", model)
    if not store.has_any(f"models/{model}/"):
        known = ", ".join(models(store)) or "none"
        raise RequestError(f"expected a model in s3://{store.bucket}, got {model!r}; there are: {known}")


def channels(store: ObjectStore, model: str) -> list[str]:
    """Every channel that was ever moved, sorted: those with a pointer, and those that only have a history."""
    prefix = channels_prefix(model)
    pointers = {
        key.removeprefix(prefix).removesuffix(".json") for key in store.list_keys(prefix) if key.endswith(".json")
    }
    return sorted(name for name in pointers | set(store.list_folders(histories_prefix(model))) if is_name(name))


def releases(store: ObjectStore, model: str, prefix: str = "") -> list[str]:
    """Ids of the releases that begin with `prefix`, complete or not, sorted."""
    return [name for name in store.list_folders(releases_prefix(model), prefix) if is_release_id(name)]

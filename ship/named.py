"""What a command line names, proven before anything is done: the one door for models and channels."""

from __future__ import annotations

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.catalog import models, require_model
from train_and_ship.registry.channels.channel import PRODUCTION, Channel
from train_and_ship.registry.identity import require_channel


def named_channel(settings: Settings, model: str, channel: str = PRODUCTION) -> Channel:
    """A channel of a model that is in the bucket. One request; the channel may never have been moved.

    Raises RequestError for a model that there is not, and for names that no model or channel can have.
    """
    require_channel(channel)
    store = ObjectStore.from_settings(settings, short_lived=True)
    require_model(store, model)
    return Channel(store, model, channel, settings.mlflow_url)


def named_kinds(allow: list[str] | None) -> list[str]:
    """In what a release may be of another kind than what is live. Raises RequestError for what is no kind."""
    from train_and_ship.registry.kind import require_kinds

    require_kinds(allow or [])
    return allow or []


def named_models(store: ObjectStore, model: str) -> list[str]:
    """The model that is named, or all when `model` is empty. Raises RequestError for one that there is not."""
    if not model:
        return models(store)
    require_model(store, model)
    return [model]

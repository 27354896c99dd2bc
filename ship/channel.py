"""`ship channel`: what moves of a channel take, as whoever owns the channel says."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.catalog import models, require_model
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.rules import Approval, Rules, read_rules, set_rules
from train_and_ship.registry.identity import require_channel


def set_channel(names: Sequence[str], approval: str, why: str, new: bool) -> None:
    """Set what moves of a channel take.

    Args:
        names: `[MODEL] CHANNEL`; the model may be left out where there is one only.
        approval: required or none.
        why: for the record.
        new: also of a model that has nothing in the bucket yet.

    Raises:
        RequestError: no such model, channel or word; or somebody else has set it meanwhile.
        SettingsError: these credentials may not set it: it takes the right of `ship iam owner`.
    """
    if approval not in list(Approval):
        raise RequestError(f"--approval: expected {' or '.join(Approval)}, got {approval!r}")
    channel = _named(names, "set", new)
    _say(set_rules(channel, Approval(approval), who(), why))


def show_channel(names: Sequence[str], as_json: bool) -> None:
    """Print what moves of a channel take. Arguments and errors: as of `set_channel`."""
    rules = read_rules(_named(names, "show", new=True))
    if as_json:
        typer.echo(json.dumps(json.loads(rules.encode()), indent=1))
    else:
        _say(rules)


def _say(rules: Rules) -> None:
    typer.echo(f"{rules.model} {rules.channel}: approval {rules}")


def _named(names: Sequence[str], word: str, new: bool) -> Channel:
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    if len(names) == 1 and len(known := models(store)) == 1:
        names = [*known, *names]
    if len(names) != 2:
        raise RequestError(
            f"expected `ship channel {word} MODEL CHANNEL`, got {' '.join(names)!r}; models: "
            f"{', '.join(models(store)) or 'none'}"
        )
    model, channel = names
    require_channel(channel)
    if not new:
        require_model(store, model)
    return Channel(store, model, channel, settings.mlflow_url)

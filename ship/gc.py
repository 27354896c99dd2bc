"""`ship gc`: releases that nobody needs any more are marked, and deleted after a grace."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta

import typer

from train_and_ship.infra.errors import ReleaseError, RequestError, ServiceError, SettingsError, ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.maintenance.observed import delete_expired
from train_and_ship.registry.maintenance.retention import Decision, Policy, Step, carry_out, decide, notify_mlflow
from train_and_ship.registry.text import file_size
from train_and_ship.ship.named import named_models

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
WILL = {Step.MARK: "would mark", Step.DELETE: "would delete", Step.UNMARK: "would unmark"}
DID = {Step.MARK: "marked", Step.DELETE: "deleted", Step.UNMARK: "unmarked"}


def duration(option: str, text: str) -> timedelta:
    """`90m`, `12h`, `7d`. Raises RequestError naming the option."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if found is None:
        raise RequestError(f"{option}: expected a number and one of s, m, h, d, w, such as 7d; got {text!r}")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def gc(model: str, policy: Policy, apply: bool, delete_versions: bool) -> None:
    """Say what would be done with every release, or do it. Exits with 1 when something could not be done."""
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    names = named_models(store, model)
    if apply:
        store.probe()
    failed = False
    for name in names:
        try:
            failed |= _model(store, name, policy, apply)
        except ReleaseError as error:
            typer.echo(f"{name}: nothing was touched: {error}", err=True)
            failed = True
            continue
        except ShipError as error:
            # Of this model only, as far as anybody knows: the others are collected.
            typer.echo(f"{name}: not done to the end: {error}", err=True)
            failed = True
            continue
        try:
            failed |= _observations(store, name, apply)
            for key, stays in (
                found
                for place in ("models", "observations")
                for found in store.drop_uploads(f"{place}/{name}/", policy.slowest_reader, dry_run=not apply)
            ):
                if stays:
                    typer.echo(f"{name}: an upload is not dropped: {on_one_line(key)}: {stays}", err=True)
                    failed = True
                else:
                    typer.echo(f"{name}: upload {'dropped' if apply else 'to drop'}: {on_one_line(key)}")
        except ShipError as error:
            typer.echo(f"{name}: uploads that were never completed stay: {error}", err=True)
            failed = True
        if apply:
            try:
                for line in notify_mlflow(store, name, settings.mlflow_url, delete_versions=delete_versions):
                    typer.echo(f"{name}: {line}")
            except (ServiceError, SettingsError, ReleaseError) as error:
                typer.echo(f"{name}: MLflow's versions are marked by a later `ship gc`: {error}", err=True)
                failed = True
    if apply:
        typer.echo(f"incomplete uploads: {store.ensure_upload_rule(max(1, policy.slowest_reader.days))}")
    else:
        typer.echo("Nothing was changed; --apply does it.")
    if failed:
        raise typer.Exit(1)


def _model(store: ObjectStore, model: str, policy: Policy, apply: bool) -> bool:
    """Print one model's releases, and with `apply` do what is said. Returns whether something was not done."""
    counted: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for decision in decide(store, model, policy):
        refusal = carry_out(store, model, decision, policy) if apply else None
        word = "not done" if refusal is not None else _word(decision, apply)
        counted[word] += 1
        sizes[word] += decision.bytes
        typer.echo(
            f"{model}  {decision.release}  {file_size(decision.bytes):>9}  {word:<12}  {refusal or decision.why}"
        )
    said = ", ".join(f"{count} {word} ({file_size(sizes[word])})" for word, count in counted.items())
    typer.echo(f"{model}: {said or 'no releases'}")
    return counted["not done"] > 0


def _observations(store: ObjectStore, model: str, apply: bool) -> bool:
    """Print how many observations are too old, and with `apply` delete them. Returns whether that failed."""
    try:
        found = delete_expired(store, model, apply=apply)
    except ReleaseError as error:
        typer.echo(f"{model}: no observation was deleted: {error}", err=True)
        return True
    if found.files:
        word = "deleted" if apply else "would be deleted"
        typer.echo(
            f"{model}: {found.files:,} files of observations ({file_size(found.bytes)}) {word}: older than "
            f"{found.days} days"
        )
    return False


def _word(decision: Decision, apply: bool) -> str:
    return (DID if apply else WILL).get(decision.step, decision.step.value)

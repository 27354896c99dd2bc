"""`ship doctor`: what is wrong in the bucket and in MLflow, and mended where that takes no decision."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import harmless
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.channels.aliases import sync_all_aliases
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.rollouts.watch import with_rollouts
from train_and_ship.registry.tracking.pending_reports import send_reports
from train_and_ship.ship.named import named_models


def doctor(model: str, dry_run: bool) -> None:
    """Examine one model, or all. Exits with 1 when something is left that people have to mend."""
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    names = named_models(store, model)
    mended = left = 0
    for name in names:
        try:
            for finding in examine(
                store, name, settings.mlflow_url, runs=settings.runs / name, public_key=settings.public_key,
                dry_run=dry_run,
            ):  # fmt: skip
                done = ("would mend" if dry_run else "mended") if finding.can_mend else "to do"
                typer.echo(f"{done:<10}  {harmless(finding.what)}")
                mended += finding.can_mend
                left += not finding.can_mend
        except ShipError as error:
            # Of this model only: the others are examined.
            typer.echo(f"{'to do':<10}  {name}: not examined to the end: {error}")
            left += 1
    examined = f"{len(names)} model{'s' if len(names) != 1 else ''} examined"
    typer.echo(
        f"{examined}: {mended} {'to mend' if dry_run else 'mended'}, {left} left to people"
        if mended or left
        else f"{examined}: all well"
    )
    if left or (dry_run and mended):
        raise typer.Exit(1)


def caught_up(settings: Settings) -> Iterator[str]:
    """After `ship up`: aliases as the pointers have them, rollouts watched again, the reports that MLflow missed.

    What is in the way is told too, and no reason to fail.
    """
    try:
        done = sync_all_aliases(ObjectStore.from_settings(settings), settings.mlflow_url)
        yield from (f"mended: {change}" for change in done.changed)
        yield from done.failed
    except ShipError as error:
        yield f"the MLflow aliases were not compared with the channels: {error}"
    try:
        left = next(with_rollouts(ObjectStore.from_settings(settings)), None)
        if left is not None and (problem := watch_rollouts(settings)):
            yield f"{left}: {problem}"
    except ShipError as error:
        yield f"whether there are rollouts to watch is not known: {error}"
    for runs in sorted(path for path in settings.runs.glob("*") if path.is_dir()):
        try:
            yield from (f"mended: {told}" for told in send_reports(runs, settings.mlflow_url))
        except ShipError as error:
            yield f"a report waits in {runs} for MLflow: {error}"

"""`ship up`: start the local stack, and say where everything is."""

from __future__ import annotations

import time

import typer

from train_and_ship.infra import stack
from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.home import open_to_others
from train_and_ship.infra.password import password_is_open
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.doctor import caught_up
from train_and_ship.ship.password import how_to_get_in


def up(only: str) -> None:
    """Start what is not running. only: as of `stack.up`."""
    began = time.monotonic()
    settings = Settings.load()
    stack.up(settings, typer.echo, only)
    bucket = f"s3://{settings.bucket}" + (
        f" at {without_password(settings.s3_endpoint)}" if settings.s3_endpoint else ""
    )
    typer.echo(
        f"\nReady in {time.monotonic() - began:.1f} s\n"
        f"  Prefect  {settings.prefect_ui_url}\n"
        f"  MLflow   {without_password(settings.mlflow_url)}\n"
        f"  bucket   {bucket}\n"
        f"  state    {settings.home}, logs in {settings.home / 'logs'}"
    )
    for line in how_to_get_in(settings):
        typer.echo(line)
    for unsafe in (open_to_others(settings.home), password_is_open(settings.home)):
        if unsafe:
            typer.echo(unsafe, err=True)
    # What moved while MLflow was away; and a new deployment does not watch.
    for line in caught_up(settings):
        typer.echo(line)

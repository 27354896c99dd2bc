"""`ship rollback` and `ship promote`: move a channel to a release that is in the bucket already.

Without Prefect, and without importing mlflow or torch: in an incident every second counts. A promotion tries the
release in a process of its own first.
"""

from __future__ import annotations

import typer

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.catalog import require_model
from train_and_ship.registry.channels.aliases import follow
from train_and_ship.registry.channels.moves import (
    Mover,
    Verified,
    choose_promotion,
    choose_rollback,
    roll_back,
    verify_target,
)
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.revisions import resolve_release


def rollback(model: str, channel: str, to: str, why: str, quick: bool) -> None:
    """Go back to what was live before, or to the release that `to` names."""
    mover = Mover(by=who(), why=why)
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    require_model(store, model)
    release = resolve_release(store, model, to, settings.mlflow_url) if to else None
    target = choose_rollback(store, model, channel, release, settings.mlflow_url)
    verified = verify_target(store, target, read_back=not quick, public_key=settings.public_key)
    _finish(settings, store, verified, roll_back(store, verified, mover))


def promote(model: str, source: str, channel: str, why: str, gates: bool, again: bool) -> None:
    """Put the release that `source` names live on a channel."""
    import asyncio

    from train_and_ship.tasks.existing import promote_tried, try_out

    mover = Mover(by=who(), why=why)
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    require_model(store, model)
    release = resolve_release(store, model, source, settings.mlflow_url)
    target = choose_promotion(store, model, channel, release, settings.mlflow_url)
    verified = verify_target(store, target, read_back=False, public_key=settings.public_key)

    async def tried() -> tuple[Verified, Pointer]:
        tried = await try_out(settings, store, verified, gates=gates)
        return tried, await promote_tried(settings, store, tried, mover, gates=gates, again=again)

    _finish(settings, store, *asyncio.run(tried()))


def _finish(settings: Settings, store: ObjectStore, verified: Verified, pointer: Pointer) -> None:
    """Let MLflow follow, and say what happened."""
    warnings = follow(store, pointer.model, pointer.channel, settings.mlflow_url)
    typer.echo(
        f"{pointer.model} {pointer.channel}: release {pointer.release} is live, generation {pointer.generation}\n"
        f"  replaced  {pointer.previous or 'nothing'}\n"
        f"  by        {pointer.moved_by}: {pointer.reason}\n"
        f"  bytes     {verified.verdicts['bytes']}"
        + (f"\n  tried     {verified.verdicts['rehearsal']}" if "rehearsal" in verified.verdicts else "")
        + (f"\n  vs live   {pointer.verdicts['vs_live']}" if "vs_live" in pointer.verdicts else "")
    )
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)

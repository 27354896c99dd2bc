"""`ship rollback` and `ship promote`: move a channel to a release that is in the bucket already.

Without Prefect, and without importing mlflow or torch: in an incident every second counts. A promotion tries the
release in a process of its own first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.prefect_events import PROMOTED, send_event
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.channels.aliases import sync_after_move
from train_and_ship.registry.channels.moves import Flow, Mover, require_asked, roll_back
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.targets import Verified, ask_promotion, choose_rollback, described, verify_target
from train_and_ship.registry.rollouts.moves import settle_if_possible
from train_and_ship.ship.named import named_channel, named_kinds

_LOADED = ("unsigned", "loaded unsigned", "not loaded")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A move that is made."""

    pointer: Pointer
    verified: Verified
    """What was proven before."""
    warnings: Sequence[str]
    """What did not follow it."""
    ended: str = ""
    """The rollout that ended by it, in words; empty where there was none."""


def rollback(model: str, channel: str, to: str, why: str, quick: bool) -> None:
    """Go back to what was live before, or to the release that `to` names, and print it."""
    _print(go_back(model, channel, to, why, quick))


def go_back(model: str, channel: str, to: str, why: str, quick: bool) -> Moved:
    """The same without a word; raises ShipError."""
    mover = Mover(by=who(), why=why)
    settings = Settings.load()
    target = choose_rollback(named_channel(settings, model, channel), to)
    if not target.was_before:
        # Before every byte is read.
        require_asked(target, "", Flow.ROLLBACK)
    verified = verify_target(target, read_back=not quick, public_key=settings.public_key)
    return _followed(settings, verified, roll_back(verified, mover))


def promote(
    model: str,
    source: str,
    channel: str,
    why: str,
    gates: bool,
    again: bool,
    allow: list[str] | None,
    load_unsigned: bool,
) -> None:
    """Put the release that `source` names live on a channel, and print it."""
    _print(go_forward(model, source, channel, why, gates, again, allow, load_unsigned))


def go_forward(
    model: str,
    source: str,
    channel: str,
    why: str,
    gates: bool,
    again: bool,
    allow: list[str] | None,
    load_unsigned: bool,
) -> Moved:
    """The same without a word; raises ShipError."""
    from train_and_ship.ship.event_loop import to_its_end
    from train_and_ship.tasks.existing import promote_tried, try_out

    mover, allow = Mover(by=who(), why=why), named_kinds(allow)
    settings = Settings.load()
    verified = ask_promotion(named_channel(settings, model, channel), source, settings.public_key)
    # Before it is tried.
    require_asked(verified.target, "", Flow.PROMOTE)

    async def tried() -> tuple[Verified, Pointer]:
        tried = await try_out(settings, verified, gates=gates, load_unsigned=load_unsigned)
        return tried, await promote_tried(
            settings, tried, mover, gates=gates, again=again, allow=allow, load_unsigned=load_unsigned
        )

    return _followed(settings, *to_its_end(tried()))


def _followed(settings: Settings, verified: Verified, pointer: Pointer) -> Moved:
    """Let MLflow follow, and tell whoever wants to be told."""
    channel = verified.target.channel
    warnings = [*sync_after_move(channel), *_untold(settings, f"{channel}: {described(pointer)}", pointer)]
    ended, problem = settle_if_possible(channel, pointer.moved_by)
    warnings += [problem] if problem else []
    return Moved(pointer=pointer, verified=verified, warnings=warnings, ended=ended)


def _print(moved: Moved) -> None:
    pointer, verified = moved.pointer, moved.verified
    typer.echo(
        f"{verified.target.channel}: release {pointer.release} is live, generation {pointer.generation}\n"
        f"  replaced  {pointer.previous or 'nothing'}\n"
        f"  by        {on_one_line(pointer.moved_by)}: {on_one_line(pointer.reason)}\n"
        f"  bytes     {verified.verdicts['bytes']}"
        + (f"\n  tried     {verified.verdicts['rehearsal']}" if "rehearsal" in verified.verdicts else "")
        + "".join(f"\n  {name}  {on_one_line(pointer.verdicts[name])}" for name in _LOADED if name in pointer.verdicts)
        + (f"\n  vs live   {on_one_line(pointer.verdicts['vs_live'])}" if "vs_live" in pointer.verdicts else "")
        + "".join(
            f"\n  {on_one_line(gate)}  {on_one_line(said)}"
            for gate, said in pointer.verdicts.items()
            if gate.endswith(" vs live")
        )
    )
    if moved.ended:
        typer.echo(f"  {moved.ended}")
    for warning in moved.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _untold(settings: Settings, title: str, pointer: Pointer) -> list[str]:
    """Send the event that a flow would; a warning where people asked to be told and cannot be."""
    try:
        send_event(settings, PROMOTED, pointer.model, title, f"{pointer.moved_by}: {pointer.reason}")
    except ServiceError as error:
        return [f"nobody was told of this move: {error}"] if settings.notify is not None else []
    return []

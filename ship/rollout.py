"""`ship rollout`: begin a rollout, show it, go on with it, end it. Without Prefect, but for telling it to watch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from train_and_ship.infra.errors import GateError, RequestError, ServiceError
from train_and_ship.infra.prefect_events import PROMOTED, ROLLOUT, send_event
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.channels.aliases import sync_after_move
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Flow, Mover, release_job, require_asked
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import Verified, ask_promotion
from train_and_ship.registry.identity import moment
from train_and_ship.registry.rollouts.live_job import not_observed
from train_and_ship.registry.rollouts.moves import Plan, go_on, require_startable, running, stop
from train_and_ship.registry.rollouts.record import Outcome, Rollout, percent, read_rollout
from train_and_ship.ship.named import named_channel, named_kinds

if TYPE_CHECKING:
    from train_and_ship.registry.job.rollout import Rollout as Steps


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, by whom and how."""

    model: str
    channel: str
    why: str
    again: bool
    allow: Sequence[str]
    load_unsigned: bool


def rollout(asked: Asked, candidate: str, steps: Mapping[str, Any], *, go_on: bool, stop: bool, as_json: bool) -> None:
    """What `ship rollout` does; raises ShipError. steps: what was said of them, by key of `release.rollout`."""
    words = [f"CANDIDATE ({candidate})"] * bool(candidate) + ["--next"] * go_on + ["--stop"] * stop
    if len(words) > 1:
        raise RequestError(f"expected one of CANDIDATE, --next and --stop, got {' and '.join(words)}")
    if steps and not candidate:
        given = ", ".join("--" + name.replace("_", "-") for name in steps)
        raise RequestError(f"expected CANDIDATE with {given}: steps are those of a rollout that begins")
    settings = Settings.load()
    channel = named_channel(settings, asked.model, asked.channel)
    if not words:
        _show(channel, as_json)
        return
    mover = Mover(by=who(), why=asked.why)
    if candidate:
        _start(settings, channel, candidate, steps, mover, asked)
    elif go_on:
        _go_on(settings, channel, mover)
    else:
        _stop(settings, channel, mover)


def _start(
    settings: Settings, channel: Channel, candidate: str, steps: Mapping[str, Any], mover: Mover, asked: Asked
) -> None:
    from train_and_ship.ship.event_loop import to_its_end
    from train_and_ship.tasks.existing import roll_out_tried, try_out

    allow = named_kinds([*asked.allow])
    steps_of = _steps(steps)
    verified = ask_promotion(channel, candidate, settings.public_key)
    # Before it is tried.
    require_startable(channel, verified.manifest, again=asked.again)
    try:
        require_asked(verified.target, "", Flow.PROMOTE)
    except GateError as error:
        error.add_note("With `-p rollout=true` it asks a person and then begins a rollout.")
        raise
    plan = Plan.of(steps_of(verified))

    async def tried() -> Rollout:
        tried = await try_out(settings, verified, load_unsigned=asked.load_unsigned)
        return await roll_out_tried(
            settings, tried, mover, plan, again=asked.again, allow=allow, load_unsigned=asked.load_unsigned
        )

    started = to_its_end(tried())
    typer.echo(_described(channel, started))
    if missing := not_observed(channel, started):
        typer.echo(f"warning: {missing}", err=True)
    _notify(settings, ROLLOUT, channel, f"{channel}: {started} has begun", mover)
    if problem := watch_rollouts(settings):
        typer.echo(
            f"warning: {problem}; until then `ship rollout {channel.model} --to {channel.name} --next --why …` goes on",
            err=True,
        )


def _steps(given: Mapping[str, Any]) -> Callable[[Verified], Steps]:
    """From the release to its steps: what was said here, and the rest as its own job says. Raises RequestError."""
    from train_and_ship.infra.errors import JobError
    from train_and_ship.registry.job.rollout import Rollout as Steps

    said = dict(given)
    if "steps" in said:
        try:
            said["steps"] = tuple(float(step) for step in said["steps"].split(","))
        except ValueError:
            raise RequestError(
                f"--steps: expected percentages with commas, such as 1,5,25,100, got {said['steps']!r}"
            ) from None

    if "stop_if" in said:
        limits = dict[str, str]()
        for limit in said["stop_if"]:
            name, equals, value = limit.partition("=")
            if not equals or name in limits:
                raise RequestError(f"--stop-if: expected each limit once, such as errors=+0.5%, got {limit!r}")
            limits[name] = value
        said["stop_if"] = limits

    def made(own: Steps | None) -> Steps:
        try:
            return Steps(**{**(own.model_dump() if own is not None else {}), **said})
        except JobError as error:
            raise RequestError(str(error).replace("Rollout: ", "--").replace("--stop_if", "--stop-if")) from None

    # What is wrong in itself is told before the bucket is asked.
    made(None)

    def of(verified: Verified) -> Steps:
        try:
            job = release_job(verified.target, verified.manifest)
        except GateError:
            return made(None)
        steps = made(job.release.rollout)
        try:
            job.require_kept(steps.by)
        except ValueError as error:
            raise RequestError(f"--stop-if: expected {error}") from None
        return steps

    return of


def _go_on(settings: Settings, channel: Channel, mover: Mover) -> None:
    after = go_on(channel, _running(channel), mover)
    typer.echo(_described(channel, after))
    if after.outcome is Outcome.PROMOTED:
        for warning in sync_after_move(channel):
            typer.echo(f"warning: {warning}", err=True)
        _notify(settings, PROMOTED, channel, f"{channel}: release {after.release} is live, after its rollout", mover)
    elif not after.is_running:
        raise typer.Exit(1)


def _stop(settings: Settings, channel: Channel, mover: Mover) -> None:
    rollout = _running(channel)
    after = stop(channel, rollout, Outcome.ROLLED_BACK, mover)
    typer.echo(_described(channel, after))
    live = read_pointer(channel)
    if live is not None and live.release == rollout.release:
        typer.echo(
            f"release {live.release} went live in this moment (generation {live.generation}); "
            f"`ship rollback {channel.model} --channel {channel.name} --why …` takes it off again",
            err=True,
        )
        raise typer.Exit(1)
    _notify(settings, ROLLOUT, channel, f"{channel}: the rollout of release {rollout.release} was ended", mover)


def _show(channel: Channel, as_json: bool) -> None:
    """Exits with 1 where nothing is running."""
    newest = read_rollout(channel)
    stands = newest is not None and newest.stands_under(read_pointer(channel))
    if as_json:
        typer.echo(json.dumps({**json.loads(newest.encode()), "void": not stands} if newest else None, indent=1))
    elif newest is not None:
        typer.echo(_described(channel, newest, void=not stands))
    else:
        typer.echo(f"{channel}: there never was a rollout", err=True)
    if not stands:
        raise typer.Exit(1)


def _running(channel: Channel) -> Rollout:
    rollout = running(channel)
    if rollout is None:
        raise RequestError(
            f"{channel}: expected a rollout that is running, got none; `ship rollout {channel.model} --to "
            f"{channel.name}` shows the last one, and with a CANDIDATE begins one"
        )
    return rollout


def _described(channel: Channel, rollout: Rollout, *, void: bool = False) -> str:
    """A rollout in lines. void: whether another pointer has ended it."""
    if not rollout.is_running:
        title = f"{channel}: the rollout of release {rollout.release} has ended: {rollout.outcome.value}"
    elif void:
        title = f"{channel}: the rollout of release {rollout.release} has ended: something else went live"
    else:
        title = f"{channel}: {rollout}"
    lines = [
        ("steps", ", ".join(map(percent, rollout.steps)) + f", each for {rollout.every:,} s, by {rollout.key}"),
        ("beside", f"generation {rollout.generation}"),
        ("started", f"{_local(moment(rollout.started_at))}: {rollout.why}"),
        ("changed", f"{_local(moment(rollout.moved_at))}, {rollout.moved_by}: {rollout.reason}"),
    ]
    if rollout.is_running and not void:
        then = "live" if rollout.is_last_step else percent(rollout.steps[rollout.step + 1])
        lines += [
            ("next", f"{then}, not before {_local(rollout.next_at)}"),
            ("deadline", _local(moment(rollout.deadline))),
        ]
    lines += [*rollout.verdicts.items()]
    return "\n".join([title, *(f"  {on_one_line(name):<8}  {on_one_line(said)}" for name, said in lines)])


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M:%S %z}"


def _notify(settings: Settings, event: str, channel: Channel, subject: str, mover: Mover) -> None:
    """The event that the flow would send; what people asked to be told and cannot be is a warning."""
    try:
        send_event(settings, event, channel.model, subject, f"{mover.by}: {mover.why}")
    except ServiceError as error:
        if settings.notify is not None:
            typer.echo(f"warning: nobody was told of it: {error}", err=True)

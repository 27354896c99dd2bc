"""`ship history` and `ship live`: every move of a channel, and what was live when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice

import typer

from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import channels
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import decided_at, read_decisions
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.timeline import disordered, doubts, holes, live_at, moved_at, numbers, parse_time
from train_and_ship.registry.identity import moment
from train_and_ship.registry.rollouts.record import percent
from train_and_ship.registry.rollouts.versions import read_versions
from train_and_ship.ship.named import named_channel

UNKNOWN = "unknown"


def history(model: str, channel: str, as_json: bool) -> None:
    """Print every move of a channel, the newest first. Exits with 1 when there is none."""
    asked = named_channel(Settings.load(), model, channel)
    moves = read_history(asked)
    if as_json:
        typer.echo(json.dumps([json.loads(move.encode()) for move in moves], indent=1))
    elif moves:
        _print_moves(moves)
    if not moves:
        typer.echo(f"{model}: {channel} was never moved; channels: {_known(asked)}", err=True)
        raise typer.Exit(1)
    if lost := holes(moves):
        typer.echo(
            f"The records of generations {numbers(lost)} are lost; `ship doctor {model}` rebuilds what it can.",
            err=True,
        )


def show_decisions(model: str, channel: str, as_json: bool, last: int) -> None:
    """Print what retraining decided, the newest first. Exits with 1 when it was never asked."""
    decisions = read_decisions(named_channel(Settings.load(), model, channel), last)
    if as_json:
        typer.echo(json.dumps([json.loads(decision.encode()) for decision in decisions], indent=1))
    elif decisions:
        for decision in reversed(decisions):
            time = f"{decided_at(decision).astimezone():%Y-%m-%d %H:%M:%S %z}"
            typer.echo(f"{time}  {decision.decision:<8}  {on_one_line(decision.why)}")
            changed = "; ".join(f"{name}: {how}" for name, how in decision.changed.items())
            version = f" (version {decision.mlflow_version})" if decision.mlflow_version else ""
            for name, said in (
                ("changed", changed), ("started from", decision.start), ("live", decision.live),
                ("candidate", decision.candidate + version), ("asked by", decision.asked),
                ("flow run", decision.flow_run),
            ):  # fmt: skip
                if said:
                    typer.echo(f"    {name}: {on_one_line(said)}")
    else:
        typer.echo(f"{model}: retraining was never asked about {channel}; `ship retrain` asks", err=True)
        raise typer.Exit(1)


def show_rollouts(model: str, channel: str, as_json: bool, last: int) -> None:
    """Print every version of the channel's rollouts, the newest first. Exits with 1 when there never was one."""
    versions = list(islice(read_versions(named_channel(Settings.load(), model, channel), last), last))
    if as_json:
        typer.echo(json.dumps([json.loads(version.encode()) for version in reversed(versions)], indent=1))
    for version in versions if not as_json else ():
        when = f"{moment(version.moved_at).astimezone():%Y-%m-%d %H:%M:%S %z}"
        what = version.outcome.value or f"{percent(version.share)}, step {version.step + 1} of {len(version.steps)}"
        typer.echo(f"{when}  {version.release}  {what}  {on_one_line(version.moved_by)}")
        said = {"why": version.reason, "flow run": version.flow_run, "beside": f"generation {version.generation}"}
        # What was asked, once: before the first step.
        first = {**version.verdicts, "deadline": version.deadline, "key": version.key}
        for name, text in {**said, **(first if version.why == version.reason and version.step == 0 else {})}.items():
            if text:
                typer.echo(f"    {on_one_line(name)}: {on_one_line(text)}")
    if not versions:
        typer.echo(f"{model}: nothing was ever rolled out on {channel}; `ship rollout` begins one", err=True)
        raise typer.Exit(1)


def live(model: str, channel: str, at: str, as_json: bool) -> None:
    """Print what is live, or was at a time. Exits with 1 when nothing was."""
    when = parse_time(at) if at else None
    asked = named_channel(Settings.load(), model, channel)
    moves: Sequence[Pointer] = []
    if when is None:
        found = read_pointer(asked)
    else:
        moves = read_history(asked)
        found = live_at(moves, when)
    time = f"at {_both(when)}" if when else "now"
    if as_json:
        typer.echo(json.dumps(json.loads(found.encode()) if found else None, indent=1))
    elif found is not None:
        typer.echo(_described(found, time, moves))
    if when is not None and (unknown := doubts(moves, found)):
        typer.echo(
            f"It is not known when generations {numbers([unknown])} went live: they may have been live then.", err=True
        )
    for earlier, later in disordered(moves):
        typer.echo(
            f"The clocks disagree: generation {later.generation} says {_both(moved_at(later))}, "
            f"before generation {earlier.generation} ({_both(moved_at(earlier))}).",
            err=True,
        )
    if found is None:
        first = f"; the first move was at {_both(moved_at(moves[0]))}" if moves else ""
        typer.echo(f"{model}: nothing was live on {channel} {time}{first}; channels: {_known(asked)}", err=True)
        raise typer.Exit(1)


def _known(channel: Channel) -> str:
    return ", ".join(channels(channel.store, channel.model)) or "none"


def _both(time: datetime | None) -> str:
    """A time in this machine's zone and in UTC."""
    if time is None:
        return UNKNOWN
    local = time.astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S %z} ({time.astimezone(UTC):%H:%M:%S} UTC)"


def _described(move: Pointer, asked: str, moves: Sequence[Pointer]) -> str:
    until = next((later for later in moves if later.generation == move.generation + 1), None)
    lines = [
        f"{move.model} {move.channel} {asked}: release {move.release}",
        f"  since     {_both(moved_at(move))}, generation {move.generation}",
        *([f"  until     {_both(moved_at(until))}, generation {until.generation}"] if until else []),
        f"  by        {on_one_line(move.moved_by)}{', a rollback' if move.kind else ''}",
        f"  why       {on_one_line(move.reason)}",
        f"  before    {move.previous or 'nothing'}",
        *([f"  version   {on_one_line(move.mlflow_version)} in MLflow"] if move.mlflow_version else []),
        *([f"  flow run  {on_one_line(move.flow_run)}"] if move.flow_run else []),
        *(f"  {on_one_line(gate):<8}  {on_one_line(said)}" for gate, said in move.verdicts.items()),
    ]
    return "\n".join(lines)


def _print_moves(moves: Sequence[Pointer]) -> None:
    """One line a move, the newest first, and below it what does not fit there."""
    width = len(str(moves[-1].generation))
    for move in reversed(moves):
        time = moved_at(move)
        when = f"{time.astimezone():%Y-%m-%d %H:%M:%S %z}" if time else UNKNOWN
        what = f"{move.release} replaced {move.previous or 'nothing'}"
        typer.echo(f"{move.generation:>{width}}  {when}  {what}  {on_one_line(move.moved_by) or UNKNOWN}")
        details = {move.kind or "why": move.reason, "flow run": move.flow_run, **move.verdicts}
        for name, said in details.items():
            if said:
                typer.echo(f"{'':{width}}    {on_one_line(name)}: {on_one_line(said)}")

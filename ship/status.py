"""`ship status`: what runs, and one table of all models: what is live, its age, the last decision and the next run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from shipreader.records import NAME
from train_and_ship.infra import janitor, stack
from train_and_ship.infra.errors import JobError, ReleaseError, ServiceError, SettingsError, ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.settings import Settings, clone_folder
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import channels, models
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import Decision, decided_at, read_decisions
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.timeline import moved_at
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.rollouts.record import Rollout, read_rollout
from train_and_ship.registry.text import file_size
from train_and_ship.ship.password import how_to_get_in

FLOW = "retrain"
FLOWS = (FLOW, "train-and-ship")
WIDE = 120
"""Columns of a terminal from which on models are shown as a table."""
COLOURS = {"up": "green", "external": "cyan"}


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """The newest flow run that was to move a channel, as Prefect has it."""

    id: str
    name: str
    state: str
    """Prefect's word for it: Promoted, Kept, Skipped, Refused, Failed, Running, …."""
    at: datetime
    """When it came into that state."""
    message: str
    """What it says of itself; empty where it says nothing."""


@dataclass(frozen=True, kw_only=True)
class ChannelStatus:
    """One channel of one model."""

    model: str
    channel: str
    live: Pointer | None
    last: Decision | None
    """What retraining decided last; None when it was never asked."""
    next: datetime | None
    """When it is asked again; None when nothing is scheduled, or nobody could tell."""
    run: LastRun | None = None
    """The newest run; None when there was none, or nobody could tell."""
    rollout: Rollout | None = None
    """Of which the candidate gets requests now."""
    unreadable: str = ""
    """Why the bucket's records of it cannot be read; the other fields are empty then."""

    def as_json(self) -> dict[str, Any]:
        """The facts, times in ISO 8601; null for what there is not."""
        last = self.last
        return {
            "model": self.model,
            "channel": self.channel,
            "release": self.live.release if self.live else None,
            "since": self.live.moved_at if self.live else None,
            "decision": {"at": decided_at(last).isoformat(), "decision": last.decision, "why": last.why}
            if last
            else None,
            "run": {**asdict(self.run), "at": self.run.at.isoformat()} if self.run else None,
            "next": self.next.isoformat() if self.next else None,
            "rollout": self._rollout_as_json(),
            **({"unreadable": self.unreadable} if self.unreadable else {}),
        }

    def _rollout_as_json(self) -> dict[str, Any] | None:
        rollout = self.rollout
        if rollout is None:
            return None
        names = ("release", "share", "step", "steps", "key", "shadow", "started_at", "moved_at", "deadline")
        return {name: getattr(rollout, name) for name in names}

    @property
    def rolling(self) -> str:
        """The rollout in a line; empty where there is none."""
        if (rollout := self.rollout) is None:
            return ""
        then = f"{rollout.next_at.astimezone():%Y-%m-%d %H:%M %z}"
        return f"{self.model} {self.channel}: {rollout}; goes on not before {then}"

    def row(self, now: datetime) -> tuple[str, ...]:
        """The cells of the table: model, channel, release, its age, how the last run ended, why, and the next run."""
        moved = moved_at(self.live) if self.live else None
        decided, why = self._ended(now)
        return (
            self.model,
            self.channel,
            self.live.release if self.live else "unreadable" if self.unreadable else "nothing",
            _ago(moved, now) if moved else "–",
            decided,
            why or self.unreadable,
            f"{self.next.astimezone():%Y-%m-%d %H:%M %z}" if self.next else "–",
        )

    def _ended(self, now: datetime) -> tuple[str, str]:
        """How the last run ended, and why: by Prefect, or by the record in the bucket where that is newer."""
        last, run = self.last, self.run
        if run is not None and (last is None or last.flow_run == run.id or decided_at(last) < run.at):
            why = last.why if last is not None and last.flow_run == run.id else run.message
            return f"{_ago(run.at, now)} ago: {run.state.lower()}", why
        return (f"{_ago(decided_at(last), now)} ago: {last.decision}", last.why) if last is not None else ("–", "")

    def lines(self, now: datetime) -> tuple[str, ...]:
        """The same for a narrow terminal: what is live, then what was decided, and when it is asked again."""
        model, channel, release, age, decided, why, then = self.row(now)
        unreadable = f": {self.unreadable}" if self.unreadable else ""
        live = f"{release}, live for {age}" if self.live else f"{release}{unreadable}"
        told = [f"{model} {channel}: {live}"]
        if self.last or self.run:
            told.append(f"  {decided}: {why}" if why else f"  {decided}")
        told += [f"  rolled out: {self.rollout}"] if self.rollout else []
        return (*told, f"  next run {then}") if self.next else tuple(told)


def status(as_json: bool) -> None:
    """Print both tables. Exits with 1 unless everything is up and every model's records can be read."""
    settings, console = Settings.load(), Console()
    rows = stack.status(settings)
    if as_json:
        _print_json(settings, rows)
        return
    # Folded, not cut: an address is there to be copied.
    components = Table("component", Column("url", overflow="fold"), "pid", Column("state", no_wrap=True))
    for row in rows:
        colour = COLOURS.get(row.state, "red")
        components.add_row(row.title, row.url, str(row.pid or ""), f"[{colour}]{row.state}[/]")
    console.print(components)
    console.print(disk_line(janitor.usage(settings)), soft_wrap=True)
    for line in how_to_get_in(settings):
        typer.echo(line)
    if any(row.state not in COLOURS for row in rows):
        raise typer.Exit(1)
    try:
        found = channel_statuses(ObjectStore.from_settings(settings), next_runs(settings), last_runs(settings))
    except ShipError as error:
        typer.echo(f"The models cannot be shown: {error}", err=True)
        raise typer.Exit(1) from None
    _print_models(found, console)
    if any(row.unreadable for row in found):
        raise typer.Exit(1)


def _print_json(settings: Settings, rows: Sequence[stack.Status]) -> None:
    """The same for programs. Of the models nothing where a server is away, with `error`. Exits as `status` does."""
    up = all(row.state in COLOURS for row in rows)
    found: list[ChannelStatus] = []
    error = ""
    if up:
        try:
            found = channel_statuses(ObjectStore.from_settings(settings), next_runs(settings), last_runs(settings))
        except ShipError as reason:
            error = str(reason)
    document = {
        "components": [asdict(row) for row in rows],
        "disk": asdict(janitor.usage(settings)),
        "models": [row.as_json() for row in found],
        **({"error": error} if error else {}),
    }
    typer.echo(json.dumps(document, indent=2))
    if not up or error or any(row.unreadable for row in found):
        raise typer.Exit(1)


def disk_line(used: janitor.Usage) -> str:
    """What runs have left on this machine, and how much it may be."""
    parts = {
        "runs": used.runs,
        "copies of releases": used.releases,
        "failed rehearsals": used.rehearsals,
        "copies of snapshots": used.snapshots,
        "deployed projects": used.projects,
        "their environments": used.environments,
    }
    what = ", ".join(f"{name} {file_size(size)}" for name, size in parts.items() if size)
    over = "; the rest is in use or may be needed" if used.total > used.limit else ""
    return f"Disk: {file_size(used.total)} of {file_size(used.limit)} (SHIP_DISK){f': {what}' if what else ''}{over}"


def channel_statuses(
    store: ObjectStore,
    scheduled: Mapping[tuple[str, str], datetime],
    ran: Mapping[tuple[str, str], LastRun] = MappingProxyType({}),
) -> list[ChannelStatus]:
    """Every channel of every model, by name. scheduled, ran: model and channel to the next run and to the last."""
    names: set[tuple[str, str]] = set()
    unlisted: list[ChannelStatus] = []
    for one in models(store):
        try:
            names |= {(one, channel) for channel in channels(store, one)}
        except (SettingsError, ServiceError) as error:
            # Of this model only: the others are shown.
            row = ChannelStatus(model=one, channel="", live=None, last=None, next=None, unreadable=str(error))
            unlisted.append(row)

    def look(name: tuple[str, str]) -> ChannelStatus:
        model, channel = name
        try:
            asked = Channel(store, model, channel)
            live, last = read_pointer(asked), read_decisions(asked, 1)
        except (ReleaseError, SettingsError, ServiceError) as error:
            # Of this channel only: the others are shown.
            return ChannelStatus(
                model=model, channel=channel, live=None, last=None, next=scheduled.get(name), unreadable=str(error)
            )
        rollout, unreadable = None, ""
        try:
            rollout = read_rollout(asked)
        except (ReleaseError, SettingsError, ServiceError) as error:
            # What is live is shown all the same.
            unreadable = str(error)
        return ChannelStatus(
            model=model,
            channel=channel,
            live=live,
            last=last[-1] if last else None,
            next=scheduled.get(name),
            run=ran.get(name),
            rollout=rollout if rollout is not None and rollout.stands_under(live) else None,
            unreadable=unreadable,
        )

    return [*in_parallel(look, sorted(names | scheduled.keys() | ran.keys())), *unlisted]


def last_runs(settings: Settings) -> dict[tuple[str, str], LastRun]:
    """The newest run of each model and channel among the last 200; empty when Prefect does not answer."""
    query = {
        "flows": {"name": {"any_": FLOWS}},
        "flow_runs": {"start_time": {"is_null_": False}},
        "sort": "START_TIME_DESC",
        "limit": 200,
    }
    try:
        reply = prefect_api(settings, "POST", "/flow_runs/filter", query)
    except ShipError:
        # `next_runs` has said so.
        return {}
    return newest(reply.json() if reply.is_success else [])


def newest(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], LastRun]:
    """The first run of each model and channel, by its tags. runs: the newest first."""
    found: dict[tuple[str, str], LastRun] = {}
    for run in runs:
        named, state = named_by(run["tags"]), run.get("state") or {}
        if named is not None and state:
            last = LastRun(
                id=str(run["id"]),
                name=str(run["name"]),
                state=str(state["name"]),
                at=datetime.fromisoformat(state["timestamp"]),
                message=str(state.get("message") or ""),
            )
            found.setdefault(named, last)
    return found


def named_by(tags: Sequence[str]) -> tuple[str, str] | None:
    """Model and channel by the tags of a run, which whoever may write to Prefect chooses; None where they name none."""
    said = dict(tag.split(":", 1) for tag in tags if ":" in tag)
    model, channel = said.get("model", ""), said.get("channel", "")
    return (model, channel) if NAME.fullmatch(model) and NAME.fullmatch(channel) else None


def next_runs(settings: Settings) -> dict[tuple[str, str], datetime]:
    """When retraining is asked next, by model and channel; empty, which is said, when Prefect does not answer."""
    query = {
        "flows": {"name": {"any_": [FLOW]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 200,
    }
    try:
        reply = prefect_api(settings, "POST", "/flow_runs/filter", query)
    except ShipError as error:
        typer.echo(f"When retraining is asked next is not known: {error}", err=True)
        return {}
    return soonest(reply.json() if reply.is_success else [], clone_folder() or Path.cwd())


def soonest(runs: Sequence[Mapping[str, Any]], folder: Path) -> dict[tuple[str, str], datetime]:
    """The first run of each model and channel. runs: in order of time; folder: to which job files are relative."""
    found: dict[tuple[str, str], datetime] = {}
    for run in runs:
        if (named := named_by(run["tags"])) is None:
            try:
                job, _ = load_job(folder / str(run["parameters"].get("job", "")))
            except JobError:
                # A file that only the worker has.
                continue
            named = job.name, job.release.channel
        found.setdefault(named, datetime.fromisoformat(run["expected_start_time"]))
    return found


def _print_models(found: Sequence[ChannelStatus], console: Console) -> None:
    if not found:
        return
    now = datetime.now(UTC)
    if console.width < WIDE:
        for row in found:
            for line in row.lines(now):
                # Cut, not folded: a reason is told whole by `ship history --decisions`.
                text = on_one_line(line.strip(), console.width - 2)
                console.print(f"  {text}" if line.startswith(" ") else text, markup=False, highlight=False)
        return
    model, live = Column("model", no_wrap=True), Column("live", no_wrap=True)
    table = Table(model, "channel", live, "age", "last run", "why", "next run")
    for row in found:
        table.add_row(*(escape(on_one_line(cell)) for cell in row.row(now)))
    console.print(table)
    for row in found:
        if row.rolling:
            console.print(f"rolled out: {row.rolling}", markup=False, highlight=False, soft_wrap=True)


def _ago(then: datetime, now: datetime) -> str:
    """How long ago, in its largest unit: `3 d`."""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"

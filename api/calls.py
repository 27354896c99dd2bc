"""What the Python API does: each call is a command, and gives back what that prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_and_ship.api.job import Job
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job import job as registry
from train_and_ship.ship.results import Checked, History, Move, Retrained, Shipped

if TYPE_CHECKING:
    from train_and_ship.registry.channels.channel import Channel

# Each function imports what it needs, as each command does: what is built into a notebook loads at once.
Folder = str | os.PathLike[str]


def check(job: Job, *, folder: Folder | None = None, export: bool = True) -> Checked:
    """Build everything a job refers to, try it once, and say what would be trained and shipped, as `ship check` does.

    Args:
        job: what is asked about.
        folder: what paths in the job are relative to; that of its file, else the current one, when None.
        export: whether the untrained model is exported and the artifacts are asked, as a run does after training.

    Returns:
        What was found. It prints as the command does.

    Raises:
        JobError: one message a mistake.
        GateError: the data fails its checks, or an artifact is not the model.
    """
    from rich.console import Console

    from train_and_ship.ship.check import check_job
    from train_and_ship.ship.event_loop import to_its_end

    asked, place, project = _placed(job, folder)
    return to_its_end(check_job(asked, place, project, export, Console(stderr=True)))


def run(job: Job, *, folder: Folder | None = None, resume: str = "", allow: Sequence[str] = ()) -> Shipped:
    """Train, export, validate, register and promote one job, here and now, as `ship run` does.

    Prefect logs to standard error meanwhile, and its page shows the run. It takes as long as it takes: Ctrl-C, or the
    button of a notebook, ends it and everything that it started.

    Args:
        job: what is to be done.
        folder: what paths in the job are relative to; that of its file, else the current one, when None.
        resume: id of an earlier run to go on with, the name of its folder; empty for a new one.
        allow: in what the release may be of another kind than what is live, this once: signature, labels, formats,
            model, live_score or runtime.

    Returns:
        The release that is live now, and where to look.

    Raises:
        JobError: the job, or code or data that it refers to, is not usable.
        GateError: the candidate was refused; what was live stays.
        RequestError: kinds, or a run to go on with, that there are not.
        SettingsError: services that nobody can reach so.
        ServiceError: a service did not answer, after retries.
        ShipError: whatever else ended the run; notes of the exception say where to look.
    """
    from train_and_ship.ship.run import run_job

    return run_job(*_placed(job, folder), resume, list(allow))


def retrain(
    job: Job,
    *,
    folder: Folder | None = None,
    why: str = "",
    force: bool = False,
    resume: str = "",
    allow: Sequence[str] = (),
) -> Retrained:
    """Train again if code, data, job or environment changed, and put live what is better, as `ship retrain` does.

    Args:
        job: what is asked about.
        folder: what paths in the job are relative to; that of its file, else the current one, when None.
        why: what is new, for the record.
        force: train although nothing has changed.
        resume: id of an earlier run to go on with; empty for a new one.
        allow: as of `run`.

    Returns:
        What was decided: skipped, promoted or kept.

    Raises:
        ShipError: as `run`.
    """
    from train_and_ship.ship.run import retrain_job

    return retrain_job(*_placed(job, folder), why, force, resume, list(allow))


def rollback(model: str, *, why: str, channel: str = "prod", to: str = "", quick: bool = False) -> Move:
    """Put back what was live before, as `ship rollback` does; going back twice goes back two releases.

    Args:
        model: name.
        why: the reason, for the record.
        channel: what is moved.
        to: a release instead: an id or its beginning, prod~2, staging, v7.
        quick: read nothing back: believe what is said of the files.

    Returns:
        The move, with the release that is live now.

    Raises:
        RequestError: a model, channel or release that there is not, or that needs a person's yes.
        ReleaseError: its files are not what they were.
        ServiceError: the bucket did not answer.
    """
    from train_and_ship.ship.rollback import go_back

    moved = go_back(model, channel, to, why, quick)
    return Move.of(moved.pointer, moved.warnings)


def promote(
    model: str,
    *,
    source: str,
    why: str,
    channel: str = "prod",
    gates: bool = True,
    again: bool = False,
    allow: Sequence[str] = (),
    load_unsigned: bool = False,
) -> Move:
    """Put a release that is in the bucket already live on a channel, after it was tried, as `ship promote` does.

    Args:
        model: name.
        source: a channel, or a release: an id or its beginning, v7.
        why: the reason, for the record.
        channel: what is moved.
        gates: ask the job's `vs_live` gates.
        again: also a release that a rollback has just left.
        allow: as of `run`.
        load_unsigned: also run code of the release that nobody signed, to try it.

    Returns:
        The move, with the release that is live now.

    Raises:
        GateError: it is not good enough, or of another kind; what was live stays.
        RequestError: a model, channel or release that there is not, or that needs a person's yes.
        ReleaseError: its files are not what they were.
        ServiceError: the bucket did not answer.
    """
    from train_and_ship.ship.rollback import go_forward

    moved = go_forward(model, source, channel, why, gates, again, list(allow), load_unsigned)
    return Move.of(moved.pointer, moved.warnings)


def live(model: str, channel: str = "prod", *, at: str = "") -> Move | None:
    """What is live on a channel, or was at a time, by the move that made it so; None when nothing was.

    Args:
        model: name.
        channel: prod, staging, or any other.
        at: `2026-11-17 14:00`, local time; or with +01:00, UTC or Europe/Berlin behind it. Now when empty.

    Raises:
        RequestError: a model that there is not, or a time that is none.
        ServiceError: the bucket did not answer.
    """
    from train_and_ship.registry.channels.history import read_history
    from train_and_ship.registry.channels.pointer import read_pointer
    from train_and_ship.registry.channels.timeline import live_at, parse_time

    when = parse_time(at) if at else None
    asked = _channel(model, channel)
    found = read_pointer(asked) if when is None else live_at(read_history(asked), when)
    return Move.of(found) if found else None


def history(model: str, channel: str = "prod") -> History:
    """Every move of a channel, the oldest first.

    Args:
        model: name.
        channel: prod, staging, or any other; empty when it was never moved.

    Raises:
        RequestError: a model that there is not.
        ServiceError: the bucket did not answer.
    """
    from train_and_ship.registry.channels.history import read_history

    return History(Move.of(move) for move in read_history(_channel(model, channel)))


def _channel(model: str, channel: str) -> Channel:
    from train_and_ship.infra.settings import Settings
    from train_and_ship.ship.named import named_channel

    return named_channel(Settings.load(), model, channel)


def _placed(job: Job, folder: Folder | None) -> tuple[registry.Job, Path, Path]:
    """The job, what stands for its file, and its project's absolute folder. Raises JobError."""
    from train_and_ship.registry.job.load import project_folder, validated

    if not isinstance(job, Job):
        raise JobError(f"job: expected a Job, such as Job.load({str(job)!r}), got {type(job).__name__}")
    file = job.file or Path(f"Job({job.name!r})")
    place = file if folder is None else Path(folder) / file.name
    return validated(job, place), place, project_folder(job, place)

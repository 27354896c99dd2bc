"""Which Python runs the code of a job: the one that it names, the project's own, or ours. No Prefect here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.interpreter import Interpreter, look_at, our_interpreter, problem_of
from train_and_ship.infra.locked_environment import python_for
from train_and_ship.infra.project_archive import LOCK, read_about, unpacked_at
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.job import Job

IN_PROJECT = Path(".venv", "bin", "python")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A Python that can run the code of a job."""

    interpreter: Interpreter
    hint: str = ""
    """Why it is not the project's own, where there is one; empty otherwise."""


def choose_interpreter(job: Job, job_file: Path, project: Path) -> Chosen:
    """The interpreter of a job, which was asked what it is and has. What a shell has activated does not count.

    Args:
        job: names one, or does not.
        job_file: what it was read from; paths are relative to its folder.
        project: absolute folder.

    Raises JobError for one that is none, or cannot run the code of a job.
    """
    folder = _absolute(job_file.parent)
    if job.python is not None:
        where = f"{job_file}: python"
        path = _absolute(folder / Path(job.python).expanduser())
        _require_file(path, job.python, where)
        return Chosen(interpreter=_usable(path, where))
    for place in dict.fromkeys((folder, project)):
        path = place / IN_PROJECT
        if not path.exists():
            continue
        try:
            found = look_at(str(path))
        except JobError as error:
            return Chosen(interpreter=our_interpreter(), hint=f"the code runs under {_ours()}: {error}")
        if found.protocol is None and not found.workers:
            hint = (
                f"the code runs under {_ours()}: {path} has no torchworker; `ship worker install --python {path}` puts "
                "it there, and jobs of this project run there then"
            )
            return Chosen(interpreter=our_interpreter(), hint=hint)
        return Chosen(interpreter=_usable(path, f"{job_file}: the project's own environment"))
    return Chosen(interpreter=our_interpreter())


def locked_interpreter(job_file: Path) -> Chosen | None:
    """The interpreter of a project that was deployed with the packages of its environment; None for every other.

    Raises JobError when that environment cannot be made here.
    """
    folder = unpacked_at(job_file)
    about = read_about(folder) if folder is not None else None
    if folder is None or about is None or not about.python:
        return None
    home = Settings.load().home
    path = Path(python_for(home, about.python, (folder / LOCK).read_text(), partial(print, flush=True)))
    return Chosen(interpreter=_usable(path, f"{about.model}: the environment of its lock"))


def _absolute(path: Path) -> Path:
    # Not resolved: the interpreter of a virtual environment is a link, and what it leads to is another one.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _ours() -> str:
    return f"the Python of train-and-ship ({our_interpreter().path})"


def _require_file(path: Path, said: str, where: str) -> None:
    if path.is_dir():
        inside = [Path(said, *rest) for rest in (("bin", "python"), IN_PROJECT.parts) if path.joinpath(*rest).exists()]
        meant = f"write python: {inside[0]}" if inside else "such as .venv/bin/python"
        raise JobError(f"{where}: expected the path of an interpreter, got the folder {path}; {meant}")
    if not path.exists():
        raise JobError(
            f"{where}: expected an interpreter at {path}, found none; the path is relative to the job file, such as "
            ".venv/bin/python. Without this key the code runs in the project's .venv where that has torchworker, else "
            "in the environment of train-and-ship"
        )


def _usable(path: Path, where: str) -> Interpreter:
    try:
        found = look_at(str(path))
    except JobError as error:
        raise JobError(f"{where}: {error}") from None
    if not found.ours and (problem := problem_of(found)):
        raise JobError(f"{where}: {path} cannot run the code of the job: {problem}")
    return found

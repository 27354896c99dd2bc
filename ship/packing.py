"""What `ship deploy` sends to workers: the files of a project, and the packages of its environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.locked_environment import lock_of
from train_and_ship.infra.project_archive import About, find_files, pack
from train_and_ship.infra.provenance import git_commit, project_place
from train_and_ship.registry.job.job import Job
from train_and_ship.tasks.interpreters import choose_interpreter

NAMED = 5
"""Of many files, so many are named."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A project, ready to be sent."""

    archive: bytes
    job: str
    """The job file, relative to the archive's tree."""
    files: int
    what: str
    """Of which commit, and with which packages, in words."""
    warnings: Sequence[str]
    """What a worker will miss, a line each."""


def pack_project(job: Job, job_file: Path, folder: Path) -> Packed:
    """The project of a job as it is now.

    Args:
        job: what the file says.
        job_file: absolute.
        folder: of the project, absolute.

    Raises JobError for what cannot be sent; nothing is written.
    """
    # git tells real paths; the folder of the project is one already.
    job_file = job_file.parent.resolve() / job_file.name
    found = find_files(job_file, folder, job.deploy.files)
    chosen = choose_interpreter(job, job_file, folder)
    interpreter, python, lock = chosen.interpreter, "", ""
    if not interpreter.ours:
        python = ".".join(interpreter.version.split(".")[:2])
        lock = _lock_file(job, job_file) or lock_of(interpreter, str(job_file))
    commit = git_commit(folder)
    about = About(
        model=job.name,
        job=job_file.relative_to(found.root).as_posix(),
        commit=commit,
        place=project_place(folder),
        python=python,
    )
    warnings = [f"{job.name}: {chosen.hint}"] if chosen.hint else []
    if found.unknown:
        some = ", ".join(found.unknown[:NAMED]) + (", …" if len(found.unknown) > NAMED else "")
        warnings.append(
            f"{job.name}: git does not know {some}, so they stay here; `git add` them, or list them in `deploy.files`"
        )
    packages = f"{len(lock.splitlines())} packages for Python {python}" if lock else "the worker's own packages"
    return Packed(
        archive=pack(found, about, lock),
        job=about.job,
        files=len(found.files),
        what=f"commit {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}, {packages}",
        warnings=warnings,
    )


def _lock_file(job: Job, job_file: Path) -> str:
    if job.deploy.lock is None:
        return ""
    path = job_file.parent / job.deploy.lock
    # Whoever reads a pipe waits for somebody to write.
    if path.exists() and not path.is_file():
        raise JobError(f"{job_file}: deploy.lock: expected a file of requirements at {path}, got something else")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{job_file}: deploy.lock: expected a file of requirements at {path}, got {error}") from None

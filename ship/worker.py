"""`ship worker install`: torchworker, for the environment of a project, from the wheel that this package carries."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import typer

from train_and_ship.infra.errors import JobError, RequestError
from train_and_ship.infra.installing import MAY_CHANGE, installer, installing_environment, torchworker_wheel
from train_and_ship.infra.interpreter import look_at, problem_of, too_old
from train_and_ship.infra.provenance import environment_lock


def install(python: Path, exports: bool) -> None:
    """Put this version of torchworker into an environment, with what it needs; another version there gives way.

    All else that is there stays as it is: what cannot be had beside it is a refusal, in the installer's own words.

    Args:
        python: interpreter of the environment.
        exports: whether also with what ONNX files are made with.

    Raises:
        RequestError: it is no Python, is too old, is ours, or can install nothing; or the installer has failed.
    """
    path = os.path.abspath(python)  # noqa: PTH100 - the link of a virtual environment, not what it leads to
    if not Path(path).is_file():
        raise RequestError(f"--python: expected an interpreter such as .venv/bin/python, found none at {path}")
    try:
        found = look_at(path)
    except JobError as error:
        raise RequestError(f"--python: {error}") from None
    if found.ours:
        raise RequestError(f"{path} is the environment of train-and-ship itself, which has its torchworker")
    if old := too_old(found):
        raise RequestError(f"{path}: {old}")
    command = installer(path)
    with torchworker_wheel() as wheel, tempfile.NamedTemporaryFile("w", suffix=".txt") as theirs:
        lock = [line for line in environment_lock(found.sites) if line.partition("==")[0] not in MAY_CHANGE]
        theirs.write("\n".join(lock))
        theirs.flush()
        asked = f"torchworker{'[exports]' if exports else ''} @ {wheel.as_uri()}"
        _run([*command, "--constraint", theirs.name, asked], exports=exports)
        if found.workers:
            # Of the same number, it may be another one all the same.
            _run([*command, "--force-reinstall", "--no-deps", str(wheel)], exports=exports)
    found = look_at.__wrapped__(path)
    if problem := problem_of(found):
        raise RequestError(f"torchworker is installed, and {path} cannot run the code of a job yet: {problem}")
    facts = found.facts()
    typer.echo(f"torchworker {facts['torchworker']} is in {found.prefix}: Python {found.version}, torch {found.torch}")


def _run(command: list[str], *, exports: bool) -> None:
    typer.echo(f"$ {' '.join(command)}")
    if status := subprocess.run(command, env=installing_environment(), check=False).returncode:
        less = "; --no-exports asks for less, and jobs make no ONNX then" if exports else ""
        raise RequestError(
            f"the installer ended with {status}, and says why above. Packages that are there already keep their "
            f"versions: one that has to have another is for you to change{less}"
        )

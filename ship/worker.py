"""`ship worker install`: torchworker, for the environment of a project, from the wheel that this package carries."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import typer

import torchworker
from train_and_ship.infra.errors import JobError, RequestError
from train_and_ship.infra.interpreter import look_at, problem_of, too_old
from train_and_ship.infra.provenance import environment_lock

WHEELS = Path(__file__).with_name("wheels")
MAY_CHANGE = ("torchworker", "python", "pip", "setuptools", "wheel")
"""What of an environment another version may take the place of: ours, and what installs."""
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


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
    command = _installer(path)
    with _wheel() as wheel, tempfile.NamedTemporaryFile("w", suffix=".txt") as theirs:
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


def _installer(python: str) -> list[str]:
    """What installs packages for a Python: its own pip, else uv, which makes environments without one."""
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        return [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", python]
    raise RequestError(
        f"{python}: expected pip there, or uv on PATH, found neither; `{python} -m ensurepip` brings pip, or install "
        f"{', '.join(str(path) for path in WHEELS.glob('torchworker-*.whl')) or 'torchworker'} in your own way"
    )


@contextlib.contextmanager
def _wheel() -> Iterator[Path]:
    """The wheel of torchworker: the one that was carried here, or of a clone one that is built now."""
    # Of several, the one that this version of the tool was released with.
    if carried := sorted(WHEELS.glob(f"torchworker-{metadata.version('torchworker')}-*.whl")):
        yield carried[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        # A copy: building in place leaves a build folder behind.
        left_out = shutil.ignore_patterns("__pycache__", "build")
        source = shutil.copytree(Path(torchworker.__file__).parent, Path(folder, "torchworker"), ignore=left_out)
        done = subprocess.run(
            [sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise RequestError(f"torchworker cannot be built from {torchworker.__file__}: expected setuptools: {last}")
        yield next(Path(folder).glob("torchworker-*.whl"))


def _run(command: list[str], *, exports: bool) -> None:
    typer.echo(f"$ {' '.join(command)}")
    if status := subprocess.run(command, check=False).returncode:
        less = "; --no-exports asks for less, and jobs make no ONNX then" if exports else ""
        raise RequestError(
            f"the installer ended with {status}, and says why above. Packages that are there already keep their "
            f"versions: one that has to have another is for you to change{less}"
        )

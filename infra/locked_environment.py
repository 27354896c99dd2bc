"""The environment of a project on another machine: made once for each lock, from the index that its pip knows."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from torchworker.durable import write_durably
from torchworker.protocol import PROTOCOL
from train_and_ship.infra.errors import JobError, RequestError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.installing import MAY_CHANGE, installer, installing_environment, torchworker_wheel
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.infra.locks import locked
from train_and_ship.infra.processes import last_lines
from train_and_ship.infra.provenance import environment_lock, installed_from

WAIT_SECONDS = 3600.0
"""For another run that makes the same environment."""
ENVIRONMENT_BYTES = "BYTES"
"""File in an environment: how much it takes on the disk, once it is complete."""
_MISSING = re.compile(r"^ERROR: (?:No matching distribution found for|.* satisfies the requirement) ([^\s(;]+)", re.M)
"""As pip says it."""


def lock_of(interpreter: Interpreter, where: str) -> str:
    """`name==version` of all that an environment has, a line each, without what is ours and what is the project's own.

    Args:
        interpreter: of the environment.
        where: begin of a message.

    Raises JobError for a package that no index has: it was installed from a file of this machine.
    """
    sources = installed_from(interpreter.sites)
    files = sorted(name for name, source in sources.items() if source == "file" and name not in MAY_CHANGE)
    if files:
        raise JobError(
            f"{where}: {', '.join(files)} of {interpreter.path} came from a file, which no worker has; put it on "
            "your index, or name a requirements file in `deploy.lock`"
        )
    kept = [
        line
        for line in environment_lock(interpreter.sites)
        if (name := line.partition("==")[0]) not in MAY_CHANGE and sources.get(name) != "folder"
    ]
    return "\n".join(kept) + "\n"


def python_for(home: Path, version: str, lock: str, say: Callable[[str], None]) -> str:
    """The interpreter of an environment with these packages and our torchworker, which is made when it is not there.

    Args:
        home: of this machine's state.
        version: of Python, such as 3.11.
        lock: lines as of pip's requirements.
        say: called with what is being done, where that takes long.

    Raises JobError: there is no such Python, or a package cannot be had.
    """
    digest = hashlib.sha256(f"{version}\n{PROTOCOL}\n{lock}".encode()).hexdigest()[:20]
    folder = home / "environments" / digest
    python = folder / "bin" / "python"
    hold(folder)
    if (folder / "COMPLETE").is_file():
        # By which the janitor knows what is used.
        os.utime(folder)
        return str(python)
    make_folder(folder.parent)
    with locked(folder.with_name(f"{digest}.lock"), "making this environment", WAIT_SECONDS, say):
        if not (folder / "COMPLETE").is_file():
            say(f"environment {digest}: {len(lock.splitlines())} packages are installed, once for this lock")
            _make(folder, version, lock)
    return str(python)


def _make(folder: Path, version: str, lock: str) -> None:
    base = _base(version)
    # Of an earlier try; a virtual environment cannot be moved into its place.
    shutil.rmtree(folder, ignore_errors=True)
    log = make_folder(folder.parent.parent / "logs") / f"environment-{folder.name}.log"
    python = folder / "bin" / "python"
    _run([base, "-m", "venv", str(folder)], log)
    requirements = folder / "lock.txt"
    write_durably(requirements, lock.encode())
    _run([*_installer(str(python)), "--requirement", str(requirements)], log)
    with torchworker_wheel() as wheel:
        asked = f"torchworker[exports] @ {wheel.as_uri()}"
        _run([*_installer(str(python)), "--constraint", str(requirements), asked], log)
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    write_durably(folder / ENVIRONMENT_BYTES, str(size).encode())
    write_durably(folder / "COMPLETE", uuid.uuid4().hex.encode())


def _installer(python: str) -> list[str]:
    try:
        return installer(python)
    except RequestError as error:
        raise JobError(str(error)) from None


def _base(version: str) -> str:
    """An interpreter of that version: ours, or one on PATH."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return os.path.realpath(sys.executable)
    found = shutil.which(f"python{version}")
    # What only stands for versions that may be installed (pyenv) is no Python yet.
    if found:
        tried = subprocess.run([found, "-c", ""], env=installing_environment(), capture_output=True, check=False)
        if tried.returncode == 0:
            return found
    raise JobError(
        f"python: the project was deployed with Python {version}, and this worker has none: expected python{version} "
        "on PATH; install it, or deploy from an environment of a version that is here"
    )


def _run(command: Iterable[str], log: Path) -> None:
    words = list(command)
    with log.open("a") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        status = subprocess.run(
            words, env=installing_environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            check=False,
        ).returncode  # fmt: skip
    if status:
        said = last_lines(log)
        missing = list(dict.fromkeys(_MISSING.findall(said)))
        what = f"cannot have {', '.join(missing)}" if missing else f"cannot be made: the installer ended with {status}"
        raise JobError(
            f"deploy: the project's environment {what} on this worker, from the index that its pip is configured with; "
            f"the log: {log}\n{said}"
        )

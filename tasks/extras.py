"""What a job needs beside what is always there: packages, a compiler, variables of the environment."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.infra.job_environment import asked_for, how_to_name, require_set, withheld
from train_and_ship.infra.provenance import source_files
from train_and_ship.registry.job.job import Job

MOST_FILES = 1000
"""Python files in which names of variables are looked for."""


ONNX = ("onnx", "onnxscript", "onnxruntime")
"""Packages with which ONNX files are made and asked."""


def require_extras(job: Job, interpreter: Interpreter) -> None:
    """Raises JobError for a format or a metric whose library or compiler is not installed, with what to do.

    Args:
        job: whose formats and metrics.
        interpreter: of the job's code.
    """
    where = "here" if interpreter.ours else f"in the environment of the job's code ({interpreter.path})"
    pip = "pip" if interpreter.ours else f"{interpreter.path} -m pip"
    if job.train.torchmetrics and not interpreter.has("torchmetrics"):
        raise JobError(
            f"{job.name}: train.metrics: {job.train.torchmetrics[0]} needs torchmetrics, and it is not installed "
            f"{where}: {pip} install 'torchmetrics>=1.6,<2'"
        )
    if "executorch" in job.export.wanted and not interpreter.has("executorch"):
        raise JobError(
            f"{job.name}: export.formats: executorch needs the library of that name, and it is not installed {where}: "
            f"{pip} install 'executorch==1.5.1', or leave executorch out of export.formats"
        )
    missing = [name for name in ONNX if not interpreter.has(name)]
    if missing and job.export.formats != "auto" and "onnx" in job.export.wanted:
        raise JobError(
            f"{job.name}: export.formats: onnx needs {', '.join(missing)}, not installed {where}: `ship worker install "
            f"--python {interpreter.path}`, or leave onnx out of export.formats"
        )
    # `auto` leaves it out then. torch looks for the same.
    if job.export.formats != "auto" and "aoti" in job.export.wanted and not shutil.which(os.environ.get("CXX", "g++")):
        raise JobError(
            f"{job.name}: export.formats: aoti needs a C++ compiler and this machine has none; install g++, name one "
            "in the variable CXX, or leave aoti out of export.formats"
        )


def require_variables(job: Job) -> None:
    """Raises JobError for a variable that `env` of the job names and this process does not have."""
    require_set(os.environ, job.env, job.name)


def not_passed_on(job: Job, folder: Path) -> str:
    """Variables that the job's code seems to read, and does not get although they are set here, and what to do.

    Empty when there are none. A guess, by the names that are in its sources.

    Args:
        job: the job.
        folder: of the project, absolute.
    """
    names = withheld(os.environ, job.env)
    found = asked_for(names, _texts(folder)) if names else []
    return how_to_name(found) if found else ""


def _texts(folder: Path) -> Iterator[str]:
    for path in itertools.islice((path for path in source_files(folder) if path.suffix == ".py"), MOST_FILES):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace")

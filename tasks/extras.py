"""What a job needs beside what is always installed."""

from __future__ import annotations

import importlib.util
import os
import shutil

from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.job import Job


def require_extras(job: Job) -> None:
    """Raises JobError for a format whose library or compiler is not installed, with what to do."""
    if "executorch" in job.export.wanted and importlib.util.find_spec("executorch") is None:
        raise JobError(
            f"{job.name}: export.formats: executorch needs the library of that name, and it is not installed here: "
            "pip install 'train-and-ship[edge]', or leave executorch out of export.formats"
        )
    # `auto` leaves it out then. torch looks for the same.
    if job.export.formats != "auto" and "aoti" in job.export.wanted and not shutil.which(os.environ.get("CXX", "g++")):
        raise JobError(
            f"{job.name}: export.formats: aoti needs a C++ compiler and this machine has none; install g++, name one "
            "in the variable CXX, or leave aoti out of export.formats"
        )

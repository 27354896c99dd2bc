"""What a job needs beside what is always installed."""

from __future__ import annotations

import importlib.util

from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.job import Job


def require_extras(job: Job) -> None:
    """Raises JobError for a format whose library is not installed, with the command that installs it."""
    if "executorch" in job.export.wanted and importlib.util.find_spec("executorch") is None:
        raise JobError(
            f"{job.name}: export.formats: executorch needs the library of that name, and it is not installed here: "
            "pip install 'train-and-ship[edge]', or leave executorch out of export.formats"
        )

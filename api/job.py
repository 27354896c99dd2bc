"""The job of the Python API: the model of the job file, which knows where it is from."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import PrivateAttr

from train_and_ship.registry.job import job as registry
from train_and_ship.registry.job.load import load_job


class Job(registry.Job):
    """One model, from code to serving bucket: the keys of the job file as arguments.

    A mistake is a JobError with a line for each key: what was expected, and what was given. Frozen;
    `model_copy(update=…)` makes another one, which is validated when it is used.
    """

    _file: Path | None = PrivateAttr(None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *changes: str) -> Job:
        """Read a job file; paths in it are relative to its folder.

        Args:
            path: of the file.
            changes: what is said otherwise than in the file, each `KEY=VALUE` as in `Job.load("job.yaml",
                "train.epochs=1")`: dots between keys, and a value in YAML.

        Raises:
            JobError: one line a mistake: where, what was expected, what was given.
        """
        read, _ = load_job(Path(path), changes)
        job = cls.model_validate({name: getattr(read, name) for name in read.model_fields_set})
        job._file = Path(path)
        return job

    @property
    def file(self) -> Path | None:
        """What it was loaded from; None when it was made in Python."""
        return self._file

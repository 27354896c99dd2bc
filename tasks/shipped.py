"""Files that a job ships beside its model: looked at before training, and put into the export's folder. No Prefect."""

from __future__ import annotations

import shutil
from pathlib import Path

from torchworker.contract import EXTRAS
from train_and_ship.infra.rundir import file_sha256
from train_and_ship.registry.job.base import digest
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.release.manifest import SHIPPED
from train_and_ship.registry.release.shipped import project_files, together, written_files


def require_files(job: Job, project: Path) -> None:
    """Raises JobError for what `export.files` names and no release can have. project: absolute folder."""
    project_files(project, job.export.files, job.name)


def files_digest(job: Job, project: Path) -> str:
    """16 hexadecimal digits that change with what `export.files` names; empty where it names nothing."""
    found = project_files(project, job.export.files, job.name)
    return digest({name: file_sha256(path) for name, path in found.items()}) if found else ""


def shipped_files(job: Job, project: Path, exported: Path) -> dict[str, Path]:
    """Where each file is now, by its path below `files/` of the release.

    Args:
        job: which files.
        project: absolute folder.
        exported: folder in which `export.extras` has written its own.

    Raises:
        JobError: no release can have one of them.
    """
    written = written_files(exported / EXTRAS, job.name) if job.export.extras is not None else {}
    return together(project_files(project, job.export.files, job.name), written, job.name)


def add_files(job: Job, project: Path, exported: Path) -> None:
    """Copy all of them below `files/` of the export's folder. Arguments and errors are those of `shipped_files`."""
    for name, path in shipped_files(job, project, exported).items():
        target = exported / SHIPPED / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_relative_to(exported):
            path.rename(target)
        else:
            shutil.copyfile(path, target)
    shutil.rmtree(exported / EXTRAS, ignore_errors=True)

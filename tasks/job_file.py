"""The job file of a run, read once: what was asked for does not change while the run goes on. No Prefect here."""

from __future__ import annotations

from pathlib import Path

from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.job_folders import require_job_folder
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.project_archive import TREE
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.projects import Reference, bring_project
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.run_folder import recorded_job
from train_and_ship.tasks.interpreters import choose_interpreter, locked_interpreter
from train_and_ship.tasks.results import JobFile

_read: dict[str, JobFile] = {}
"""By the flow run that was asked for it, in this process."""
_given: dict[str, tuple[Job, Path]] = {}
"""Path of a job file, or of what is in its place, to the job and its project, in this process."""


def give_job(path: Path, job: Job, project: Path) -> None:
    """Have the runs that this process begins take this job for what is at the path: the file is not read again.

    It is no parameter of a flow: whoever may start a run on a worker says which job, and not what is in it.

    Args:
        path: as the flow is given it.
        job: read from there, or made in Python.
        project: its absolute folder.
    """
    _given[str(path)] = job, project


def read_job_file(path: str, flow_run_id: str) -> JobFile:
    """Read and validate the job file of a flow run, which this process knows from then on.

    Raises JobError, also for one outside the folders whose jobs a worker runs.
    """
    if (known := _read.get(flow_run_id)) is None:
        job, project, file = _read_allowed(path)
        chosen = locked_interpreter(file) or choose_interpreter(job, file, project)
        known = _read[flow_run_id] = JobFile(job=job, project=project, interpreter=chosen.interpreter, hint=chosen.hint)
    return known


def newest_run() -> str:
    """Id of the flow run that this process has begun last; empty before the first."""
    return next(reversed(_read), "")


def find_run(path: str, flow_run_id: str, origin: str, runs: Path) -> tuple[str, Path] | None:
    """Model and folder of a run, for whoever cleans up after it; None for a job file that nobody can read.

    The file itself is read only when neither this process nor the run's folder knows the model.

    Args:
        path: of the job file.
        flow_run_id: the flow run, which may have been another process.
        origin: id of the flow run that began it, after which its folder is named.
        runs: folder of the runs of every model.
    """
    found = [folder for folder in runs.glob("*") if Path(origin).name == origin and (folder / origin).is_dir()]
    try:
        model = found[0].name if found and flow_run_id not in _read else job_of(path, flow_run_id, None).name
    except ShipError:
        return None
    return model, runs / model / origin


def job_of(path: str, flow_run_id: str, folder: Path | None) -> Job:
    """The job of a run, as this process or the run's folder knows it; else as it is in the file. Raises JobError.

    Args:
        path: of the job file.
        flow_run_id: the flow run, which may have been another process.
        folder: of the run; None when nobody knows it.
    """
    if (known := _read.get(flow_run_id)) is not None:
        return known.job
    recorded = recorded_job(folder) if folder is not None else None
    return recorded or _read_allowed(path)[0]


def _read_allowed(path: str) -> tuple[Job, Path, Path]:
    """The job, the folder of its project and the file; a project that was deployed is brought here first."""
    file, reference = Path(path), Reference.parse(path)
    if (given := _given.get(path)) is not None:
        return *given, file
    if reference is not None:
        settings = Settings.load()
        # Before it is brought: by its place a worker knows what its owner has named.
        require_job_folder(reference.folder(settings.home) / TREE / reference.job)
        file = bring_project(ObjectStore.from_settings(settings), reference, settings.home, settings.public_key)
    else:
        require_job_folder(file)
    job, project = load_job(file)
    return job, project, file

"""`ship deploy`: every model that a job file describes is retrained on a schedule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.job_folders import add_job_folder
from train_and_ship.infra.prefect_rest import require_prefect
from train_and_ship.infra.projects import claim
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.load import load_job


def deploy(job_files: Sequence[Path], cron: str | None, timezone: str | None) -> None:
    """One deployment a job file; nothing is deployed when any of them has a mistake.

    cron, timezone: for all of them in place of what each job says; None leaves it to the job.
    """
    jobs: dict[str, Path] = {}
    schedules: dict[str, tuple[str | None, str | None]] = {}
    projects: dict[str, Path] = {}
    mistakes = []
    warnings: set[str] = set()
    for path in job_files:
        try:
            job, folder = load_job(path)
        except JobError as error:
            mistakes.append(str(error))
            continue
        if job.name in jobs:
            mistakes.append(f"{path}: name: {job.name} is the model of {jobs[job.name]} too; one job file a model")
        jobs[job.name] = path.absolute()
        projects[job.name] = folder
        schedules[job.name] = (cron or job.retrain.cron, timezone or job.retrain.timezone)
        if missing := [variable for variable in job.env if variable not in os.environ]:
            warnings.add(
                f"{job.name}: env: {' and '.join(missing)} is not set here; the worker's environment needs it, or its "
                "runs end before they begin"
            )
    if mistakes:
        raise JobError("\n".join([*mistakes, "nothing was deployed"]))
    settings = Settings.load()
    # Prefect reads its settings when it is imported.
    os.environ.update(settings.prefect_variables)
    from train_and_ship.tasks.deployments import deploy_jobs, require_schedule

    for name, schedule in schedules.items():
        require_schedule(*schedule, where=f"{name}: ")
    require_prefect(settings)
    for name, folder in projects.items():
        claim(settings.home, name, folder)
    if settings.prefect_is_local:
        for path in jobs.values():
            add_job_folder(settings.home, path.resolve().parent)
    for name, scheduled in deploy_jobs(jobs, schedules).items():
        typer.echo(f"{name}  {scheduled.schedule or 'no schedule'}")
        warnings.update(map(str, scheduled.skipped))
    for warning in sorted(warnings):
        typer.echo(f"warning: {warning}", err=True)

"""`ship deploy`: every model that a job file describes is retrained on a schedule, by any worker of the bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.job_folders import add_job_folder
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_rest import require_prefect
from train_and_ship.infra.project_archive import TREE
from train_and_ship.infra.projects import claim
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.projects import publish_project
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.packing import Packed, pack_project


def deploy(job_files: Sequence[Path], cron: str | None, timezone: str | None, *, in_place: bool = False) -> None:
    """One deployment a job file; nothing is deployed when any of them has a mistake.

    Args:
        job_files: one a model.
        cron: for all of them in place of what each job says; None leaves it to the job.
        timezone: the same.
        in_place: whether workers run the files where they are, which only those of this machine can, in place of what
            they are now.
    """
    jobs: dict[str, tuple[Job, Path, Path]] = {}
    packed: dict[str, Packed] = {}
    mistakes = []
    warnings: set[str] = set()
    for path in job_files:
        try:
            job, folder = load_job(path)
            if not in_place:
                packed[job.name] = pack_project(job, path.absolute(), folder)
        except JobError as error:
            mistakes.append(str(error))
            continue
        if job.name in jobs:
            mistakes.append(f"{path}: name: {job.name} is the model of {jobs[job.name][1]} too; one job file a model")
        jobs[job.name] = job, path.absolute(), folder
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
    from train_and_ship.tasks.deployments import Wanted, deploy_jobs, require_schedule

    for name, (job, _, _) in jobs.items():
        require_schedule(cron or job.retrain.cron, timezone or job.retrain.timezone, where=f"{name}: ")
    require_prefect(settings)
    for name, (_, _, folder) in jobs.items():
        claim(settings.home, name, folder)
    store = ObjectStore.from_settings(settings) if packed else None
    wanted = {}
    for name, (job, path, _) in jobs.items():
        what, place = str(path), path.resolve().parent
        if store is not None:
            sent = packed[name]
            reference = publish_project(store, name, sent.job, sent.archive, settings.signing_key)
            what, place = str(reference), reference.folder(settings.home) / TREE
            typer.echo(f"{name}: {sent.files:,} files, {sent.what}, {len(sent.archive) / 1e6:,.1f} MB")
            warnings.update(sent.warnings)
        if settings.prefect_is_local:
            add_job_folder(settings.home, place)
        wanted[name] = Wanted(
            job=what,
            channel=job.release.channel,
            cron=cron or job.retrain.cron,
            timezone=timezone or job.retrain.timezone,
        )
    for name, scheduled in deploy_jobs(wanted).items():
        typer.echo(f"{name}  {scheduled.schedule or 'no schedule'}")
        warnings.update(map(str, scheduled.skipped))
    for warning in sorted(warnings):
        typer.echo(f"warning: {warning}", err=True)

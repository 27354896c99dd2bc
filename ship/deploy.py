"""`ship deploy`: every model that a job file describes is retrained on a schedule, by any worker of the bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from train_and_ship.infra.errors import JobError, RequestError
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


@dataclass(frozen=True, kw_only=True)
class Where:
    """On which machines a deployment runs, as it was typed."""

    in_place: bool = False
    """Whether workers run the files where they lie, which only those of this machine can, as they are then."""
    pool: str = ""
    image: str = ""
    variables: Sequence[str] = ()
    """As of `parse_variables`."""

    def require_sense(self) -> None:
        """Raises RequestError for words that do not go together."""
        if (self.image or self.variables) and not self.pool:
            raise RequestError("--image, --job-variable: expected --pool too, which says where; got none")
        if self.in_place and self.pool:
            raise RequestError("--in-place: expected the local stack's own pool, whose worker is here; got --pool too")


def deploy(job_files: Sequence[Path], cron: str | None, timezone: str | None, where: Where | None = None) -> None:
    """One deployment a job file; nothing is deployed when any of them has a mistake.

    Args:
        job_files: one a model.
        cron: for all of them in place of what each job says; None leaves it to the job.
        timezone: the same.
        where: on which machines.
    """
    where = where or Where()
    where.require_sense()
    jobs: dict[str, tuple[Job, Path, Path]] = {}
    packed: dict[str, Packed] = {}
    mistakes = []
    warnings: set[str] = set()
    for path in job_files:
        try:
            job, folder = load_job(path)
            if not where.in_place:
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
    from train_and_ship.tasks.pools import require_pool

    for name, (job, _, _) in jobs.items():
        require_schedule(cron or job.retrain.cron, timezone or job.retrain.timezone, where=f"{name}: ")
    require_prefect(settings)
    pool = require_pool(settings, where.pool, where.image, where.variables) if where.pool else None
    warnings.update(pool.warnings if pool is not None else ())
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
    for name, scheduled in deploy_jobs(wanted, pool).items():
        typer.echo(f"{name}  {scheduled.schedule or 'no schedule'}")
        warnings.update(map(str, scheduled.skipped))
    for warning in sorted(warnings):
        typer.echo(f"warning: {warning}", err=True)

"""Stage: what the data is like, read once before training in a process of its own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from torchworker.contract import InspectResult, Project, decode
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.provenance import code_fingerprint, environment_lock
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.data.checks import check_data, require_good_data
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.lineage import Inputs, config_digest
from train_and_ship.registry.release.manifest import DATA
from train_and_ship.registry.report.data_sections import data_page
from train_and_ship.registry.run_folder import CHECKS, recall, write_fact
from train_and_ship.tasks.policy import artifact_key, worth_retrying
from train_and_ship.tasks.requests import inspect_request
from train_and_ship.tasks.run import Run
from train_and_ship.tasks.worker import call_worker

FACTS = "data.json"


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """The data as it was before training; being read still when nothing hangs on it yet."""

    reading: asyncio.Task[InspectResult]

    async def facts(self) -> InspectResult:
        """Raises what reading raises: JobError, WorkerError."""
        return await asyncio.shield(self.reading)


@task(
    name="inspect",
    task_run_name="inspect",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=worth_retrying,
)
async def inspect(run: Run) -> Inspected:
    """Read the data for its fingerprint and distribution, and hold it against `data.checks`.

    Without checks nothing waits: it is read beside what comes next. Raises GateError with what failed, JobError when
    the data cannot be read.
    """
    reading = asyncio.create_task(read_facts(run.fork_server, run.job, run.project, run.folder))
    checks = run.job.data.checks
    if checks is None:
        return Inspected(reading=reading)
    with run.timed("inspect"):
        facts = await reading
        live, before = await asyncio.to_thread(_live_facts, run)
        if live and before is None:
            get_run_logger().warning("the live release %s does not say what its data was like: no drift is asked", live)
        report = check_data(checks, facts, before, live)
        write_fact(run.folder, CHECKS, report)
    await acreate_markdown_artifact(
        data_page(run.job.name, facts, report),
        key=f"data-{artifact_key(run.job.name)}",
        description=f"{len(report.findings)} checks of the data, {len(report.failed)} failed",
    )
    require_good_data(run.job.name, report)
    get_run_logger().info("the data passes %d checks", len(report.findings))
    return Inspected(reading=reading)


def _live_facts(run: Run) -> tuple[str, InspectResult | None]:
    """The live release, empty when there is none, and what its data was like, None where that is not known."""
    live = read_pointer(run.store, run.job.name, run.job.release.channel)
    if live is None:
        return "", None
    try:
        record = read_release_record(run.store, run.job.name, live.release)
        return live.release, recall(InspectResult, record.document(DATA))
    except ReleaseError:
        # It is broken, which the comparison with it says when it comes to that.
        return live.release, None


async def read_facts(fork_server: ForkServer, job: Job, project: Project, folder: Path) -> InspectResult:
    """What the data is like; what this run has found out already. Raises JobError, WorkerError."""
    request = inspect_request(job, project)
    asked = json.dumps(request.ranges, sort_keys=True)
    stage = StageFolder(folder, "inspect", inputs=f"{job.training_digest()} {asked}")
    if not stage.is_complete():
        work = stage.begin()
        result: InspectResult = decode(InspectResult, await call_worker(fork_server, "inspect", request, work))
        result.write(work / FACTS)
        stage.finish()
    return InspectResult.read(stage.path / FACTS)


def data_fingerprint(facts: InspectResult) -> str:
    """Of both splits: what is held out decides on promotion, so it counts as well."""
    return f"{facts.train.fingerprint} {facts.validation.fingerprint}"


def snapshot_fingerprint(sha256: str) -> str:
    return f"snapshot {sha256}"


async def code_and_packages(job: Job, project_folder: Path) -> tuple[str, dict[str, str]]:
    """Fingerprint of the code, and version by package, as they are now."""
    libraries = [project_folder / library for library in job.export.libraries]
    code, lock = await asyncio.gather(
        asyncio.to_thread(code_fingerprint, project_folder, libraries), asyncio.to_thread(environment_lock)
    )
    return code, dict(line.split("==", 1) for line in lock)


async def inputs_of(job: Job, project_folder: Path, data: str) -> Inputs:
    """Fingerprints of everything that a release of this job is made from, as it is now. data: that of the data."""
    code, packages = await code_and_packages(job, project_folder)
    return Inputs(code=code, data=data, config=config_digest(job), environment=packages)

"""Stage: what the data is like, read once before training in a process of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

from prefect import get_run_logger

from torchworker.contract import InspectResult, Project
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.data.checks import Report, check_data, require_good_data
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.job.data import Checks
from train_and_ship.registry.job.export import Export
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.report.data_sections import data_page
from train_and_ship.registry.run_folder import CHECKS, FACTS, INSPECT, stage_inputs, write_fact
from train_and_ship.tasks.policy import show
from train_and_ship.tasks.requests import inspect_request
from train_and_ship.tasks.results import Inspected, Run
from train_and_ship.tasks.stage import WORKER_DELAYS, run_stage, stage_task
from train_and_ship.tasks.worker import ask_worker


@stage_task("inspect", delays=WORKER_DELAYS)
async def inspect(run: Run) -> Inspected:
    """Read the data for its fingerprint and distribution, and hold it against `data.checks`.

    Without checks nothing waits: it is read beside what comes next. Raises GateError with what failed, JobError when
    the data cannot be read.
    """
    reading = asyncio.create_task(read_facts(run.rooms.project, run.job, run.project, run.folder))
    checks = run.job.data.checks
    if checks is None:
        return Inspected(reading=reading)
    with run.timed("inspect"):
        facts = await reading
        live, before = await asyncio.to_thread(_live_facts, run)
        if live and before is None:
            get_run_logger().warning("the live release %s does not say what its data was like: no drift is asked", live)
        report = _checked(checks, facts, before, live)
        write_fact(run.folder, CHECKS, report)
    title = f"{len(report.findings)} checks of the data, {len(report.failed)} failed"
    await show(data_page(run.job.name, facts, report), title, run.job.name, "data")
    require_good_data(run.job.name, report)
    get_run_logger().info("the data passes %d checks", len(report.findings))
    return Inspected(reading=reading)


def _checked(checks: Checks, facts: InspectResult, before: InspectResult | None, live: str) -> Report:
    """As `check_data`. What the live release says may be somebody else's: what cannot be compared tells nothing."""
    if before is not None:
        try:
            report = check_data(checks, facts, before, live)
            # What it says may be sound and what comes of it no number.
            json.dumps(dataclasses.asdict(report), allow_nan=False)
            return report
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said = on_one_line(f"{type(error).__name__}: {error}")
            get_run_logger().warning("no drift is asked: what release %s says of its data is absurd: %s", live, said)
    return check_data(checks, facts, None, live)


def _live_facts(run: Run) -> tuple[str, InspectResult | None]:
    """The live release, empty when there is none, and what its data was like, None where that is not known."""
    live = read_pointer(run.channel)
    if live is None:
        return "", None
    try:
        record = read_release_record(run.store, run.job.name, live.release, sha256=live.manifest_sha256)
        return live.release, record.data
    except ReleaseError as error:
        # Where it is broken, the comparison with it says so when it comes to that.
        get_run_logger().warning("%s", on_one_line(str(error)))
        return live.release, None


async def read_facts(fork_server: ForkServer, job: Job, project: Project, folder: Path) -> InspectResult:
    """What the data is like; what this run has found out already.

    Args:
        fork_server: what the worker process is forked from.
        job: whose data is read, for `data.checks` too.
        project: the user's code.
        folder: run directory.

    Raises JobError when the data cannot be read, WorkerError when the worker died.
    """
    request = inspect_request(job, project)
    # What is drawn only where the job says how much: the facts of a run of before, which drew nothing, still hold.
    drawn = [] if request.most == Export.model_fields["validation_samples"].default else [request.most]
    asked = json.dumps([request.ranges, *drawn] if drawn else request.ranges, sort_keys=True)
    stage = StageFolder(folder, INSPECT, stage_inputs(job.training_digest(), asked))

    async def make(work: Path) -> InspectResult:
        return await ask_worker(fork_server, "inspect", request, InspectResult, work)

    # A run that decides has read the data before it begins.
    return await run_stage(stage, InspectResult, make, FACTS, quiet=True)

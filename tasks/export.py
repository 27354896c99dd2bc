"""Stage: one artifact a format, and the reference data they are held against."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from torchworker.contract import ExportResult
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.agreement import require_may_pass
from train_and_ship.registry.cost import read_costs
from train_and_ship.registry.data.readings import contradictions_of_gates, contradictions_of_training
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.run_folder import EXPORT, stage_inputs
from train_and_ship.tasks.at_work import now_at
from train_and_ship.tasks.readings import require_same_data
from train_and_ship.tasks.requests import export_request
from train_and_ship.tasks.results import Exported, Inspected, Run, Trained
from train_and_ship.tasks.shipped import add_files, files_digest
from train_and_ship.tasks.stage import WORKER_DELAYS, run_stage, stage_task
from train_and_ship.tasks.worker import ask_worker

LEAST_SECONDS, TRAINING_SHARE = 60.0, 0.1
"""What `parity.seconds` is where the job does not say: so much of the training's seconds, and no less than these."""


@stage_task("export", delays=WORKER_DELAYS)
async def export(run: Run, inspected: Inspected, trained: Trained) -> Exported:
    """Write every format of the job side by side; all of them or none, or with `auto` those that fit.

    Args:
        run: whose formats.
        inspected: the data; which of the held-out samples the gates look at.
        trained: the weights, and what was read to make them.

    Raises:
        JobError: the model cannot be captured faithfully, the data could not be read, or no release can have one of the
            files that the job ships.
        GateError: processes of this run have read different data, or the model cannot pass the job's gates.
        WorkerError: the worker died.
    """
    facts = await inspected.facts()
    await require_same_data(run, contradictions_of_training(run.job, facts, trained.result))
    require_may_pass(run.job, trained.result)
    project = Path(run.project.folder)
    inputs = stage_inputs(
        trained.digest,
        run.job.export.model_dump_json(),
        *(("coupled",) if run.project.coupled else ()),
        *((f"group {run.project.group}",) if run.project.group is not None else ()),
        *((f"raw {run.project.raw}",) if run.project.raw is not None else ()),
        # The samples' places are kept for it.
        *(("for live",) if run.project.for_live is not None else ()),
        *((f"parity {run.job.parity.seconds}",) if run.job.parity.seconds is not None else ()),
        *((f"files {await asyncio.to_thread(files_digest, run.job, project)}",) if run.job.export.files else ()),
    )
    stage = StageFolder(run.folder, EXPORT, inputs)
    told: set[str] = set()

    async def make(work: Path) -> ExportResult:
        request = export_request(run.job, run.project, work, weights=str(trained.weights))
        request = replace(
            request,
            drawn=facts.drawn,
            ignored=trained.result.ignored,
            parity_seconds=seconds_of_parity(run.job, run.folder),
        )
        left = dict.fromkeys([*run.job.export.wanted, *request.int8])
        total = len(left)
        now_at("export", left)

        def on_event(event: dict[str, Any]) -> None:
            left.pop(event["format"], None)
            now_at("export", left, 1 - len(left) / total)
            if event["event"] == "made":
                told.add(event["format"])
                get_run_logger().info("%s: %s in %.1f s", event["format"], event["method"], event["seconds"])

        made = await ask_worker(run.rooms.project, "export", request, ExportResult, work, on_event)
        await asyncio.to_thread(add_files, run.job, project, work)
        return made

    with run.timed("export"):
        result = await run_stage(stage, ExportResult, make)
        await require_same_data(run, contradictions_of_gates(run.job, facts, result))
    for kind, artifact in result.artifacts.items():
        if kind not in told:
            get_run_logger().info("%s: %s in %.1f s", kind, artifact.method, artifact.seconds)
        for note in artifact.notes:
            get_run_logger().warning("%s: %s", kind, note)
    for kind, why in result.left_out.items():
        get_run_logger().warning("%s is left out: %s", kind, why)
    return Exported(folder=stage.path, result=result, digest=stage.digest(), weights=trained.weights)


def seconds_of_parity(job: Job, folder: Path) -> float:
    """How long the model is asked about held-out samples. folder: of the run, which knows what its training took."""
    if job.parity.seconds is not None:
        return job.parity.seconds
    trained = sum(item.wall for item in read_costs(folder) if item.stage == "train")
    return max(LEAST_SECONDS, TRAINING_SHARE * trained)

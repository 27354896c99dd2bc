"""Stage: one artifact a format, and the reference data they are held against, each in a fresh process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from infra.rundir import StageFolder
from tasks.policy import worth_retrying
from tasks.run import Run
from tasks.train import Trained
from tasks.worker import call_worker
from torchworker.contract import RESULT, ExportRequest, ExportResult, Reply, decode

REFERENCE = "golden"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A complete export stage."""

    folder: Path
    formats: dict[str, ExportResult]
    reference: ExportResult
    digest: str


@task(
    name="export",
    task_run_name="export",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=worth_retrying,
)
async def export(run: Run, trained: Trained) -> Exported:
    """Write every format of the job side by side; all of them or none."""
    logger = get_run_logger()
    stage = StageFolder(run.folder, "export", inputs=trained.digest)
    wanted = [REFERENCE, *run.job.export.formats]
    with run.timed("export"):
        if stage.is_complete():
            logger.info("export: already complete in this run, verified by hash")
        else:
            work = stage.begin()
            async with asyncio.TaskGroup() as group:
                for kind in wanted:
                    group.create_task(_export_one(run, trained, kind, work))
            stage.finish()
    results = {kind: _result(stage.path / "calls" / kind) for kind in wanted}
    for kind in run.job.export.formats:
        logger.info("%s: %s in %.1f s", kind, results[kind].method, results[kind].seconds)
    reference = results.pop(REFERENCE)
    return Exported(folder=stage.path, formats=results, reference=reference, digest=stage.digest())


async def _export_one(run: Run, trained: Trained, kind: str, work: Path) -> None:
    call = work / "calls" / kind
    call.mkdir(parents=True)
    request = ExportRequest(
        project=run.project,
        folder=str(work),
        weights=str(trained.weights),
        format=kind,
        batch=run.job.export.batch,
        seed=run.job.train.seed,
        validation_limit=run.job.export.validation_samples,
    )
    await call_worker(run.host, "export", request, call)


def _result(call: Path) -> ExportResult:
    result: ExportResult = decode(ExportResult, Reply.read(call / RESULT).result)
    return result

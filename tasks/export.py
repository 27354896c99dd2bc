"""Stage: one artifact a format, and the reference data they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from torchworker.contract import RESULT, ExportRequest, ExportResult, Reply, decode
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.tasks.policy import worth_retrying
from train_and_ship.tasks.requests import dynamic_dims
from train_and_ship.tasks.run import Run
from train_and_ship.tasks.train import Trained
from train_and_ship.tasks.worker import call_worker


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A complete export stage."""

    folder: Path
    result: ExportResult
    digest: str
    weights: Path
    """What every format was made of."""

    @property
    def formats(self) -> dict[str, str]:
        """Format to file name."""
        return {kind: artifact.file for kind, artifact in self.result.artifacts.items()}


@task(
    name="export",
    task_run_name="export",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=worth_retrying,
)
async def export(run: Run, trained: Trained) -> Exported:
    """Write every format of the job side by side; all of them or none, or with `auto` those that fit."""
    logger = get_run_logger()
    stage = StageFolder(run.folder, "export", inputs=f"{trained.digest} {run.job.export.model_dump_json()}")
    with run.timed("export"):
        if stage.is_complete():
            logger.info("export: already complete in this run, verified by hash")
        else:
            work = stage.begin()
            int8 = run.job.export.int8
            request = ExportRequest(
                project=run.project,
                folder=str(work),
                weights=str(trained.weights),
                formats=run.job.export.wanted,
                auto=run.job.export.formats == "auto",
                libraries=[str(Path(run.project.folder, name)) for name in run.job.export.libraries],
                batch=run.job.export.batch,
                seed=run.job.train.seed,
                validation_limit=run.job.export.validation_samples,
                dynamic=dynamic_dims(run.job),
                max_batch=run.job.export.max_batch,
                int8=int8.wanted if int8 is not None else (),
                calibration_samples=int8.samples if int8 is not None else 0,
            )
            await call_worker(run.fork_server, "export", request, work)
            stage.finish()
    result: ExportResult = decode(ExportResult, Reply.read(stage.path / RESULT).result)
    for kind, artifact in result.artifacts.items():
        logger.info("%s: %s in %.1f s", kind, artifact.method, artifact.seconds)
    for kind, why in result.left_out.items():
        logger.warning("%s is left out: %s", kind, why)
    return Exported(folder=stage.path, result=result, digest=stage.digest(), weights=trained.weights)

"""Stage: parity, quality and latency of every artifact, in a process without the training code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from infra.errors import GateError
from infra.rundir import StageFolder
from registry.gates import verdict_table, worst
from tasks.export import Exported
from tasks.policy import worth_retrying
from tasks.requests import fixed_gates, user_modules
from tasks.run import Run
from tasks.worker import call_worker
from torchworker.contract import RESULT, Reply, ValidateRequest, ValidateResult, decode


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A candidate that passed every gate that it can be held against alone."""

    exported: Exported
    result: ValidateResult
    folder: Path
    digest: str

    @property
    def quality(self) -> dict[str, float]:
        """Each metric at its worst over the formats: any of them may be the one that serves."""
        return worst(self.result.metrics)


@task(
    name="validate",
    task_run_name="validate",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=worth_retrying,
)
async def validate(run: Run, exported: Exported) -> Validated:
    """Raises GateError with the whole table when any gate fails or could not be evaluated."""
    logger = get_run_logger()
    stage = StageFolder(run.folder, "validate", inputs=f"{exported.digest} {run.job.digest()}")
    with run.timed("validate"):
        if stage.is_complete():
            logger.info("validate: already complete in this run, verified by hash")
        else:
            work = stage.begin()
            request = ValidateRequest(
                folder=str(exported.folder),
                formats=exported.formats,
                inputs=exported.result.inputs,
                outputs=exported.result.outputs,
                metrics=run.job.metrics,
                gates=fixed_gates(run.job),
                forbidden_modules=user_modules(run.job),
                forbidden_folder=run.project.folder,
                threads=run.job.threads,
                not_finite=run.job.parity.not_finite,
                refusals=run.job.parity.refusals,
            )
            await call_worker(run.host, "validate", request, work)
            stage.finish()
    result: ValidateResult = decode(ValidateResult, Reply.read(stage.path / RESULT).result)
    table = verdict_table(result.verdicts)
    if not result.passed:
        failed = [verdict for verdict in result.verdicts if not verdict.passed]
        worst_of = ", ".join(f"{item.format} {item.gate} ({item.case})" for item in failed)
        raise GateError(
            f"{run.job.name}: {len(failed)} of {len(result.verdicts)} gates failed: {worst_of}. "
            "Nothing was registered or promoted.",
            table,
        )
    logger.info("all %d gates passed\n%s", len(result.verdicts), table)
    return Validated(exported=exported, result=result, folder=stage.path, digest=stage.digest())

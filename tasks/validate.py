"""Stage: parity, quality and speed of every artifact, in processes without the training code."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from torchworker.contract import (
    GOLDEN,
    INT8_OF,
    CppResult,
    MeasureResult,
    ScoreRequest,
    ScoreResult,
    Timed,
    ValidateRequest,
    ValidateResult,
    decode,
)
from train_and_ship.infra.errors import GateError
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.gates import verdict_table, worst
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.report.speed import speed_table
from train_and_ship.tasks.explain import explain
from train_and_ship.tasks.export import Exported
from train_and_ship.tasks.policy import worth_retrying
from train_and_ship.tasks.requests import fixed_gates, int8_limits, measure_request, speed_gates, user_modules
from train_and_ship.tasks.run import Run
from train_and_ship.tasks.variants import standing, without, worse_dropped
from train_and_ship.tasks.worker import call_worker

VERDICTS = "verdicts.json"


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A candidate that passed every gate that it can be held against alone."""

    job: Job
    exported: Exported
    result: ValidateResult
    folder: Path
    digest: str

    @property
    def quality(self) -> dict[str, float]:
        """Each metric at its worst over the formats: any of them may be the one that serves."""
        return worst(self.job, self.result.metrics)

    @property
    def dropped(self) -> dict[str, str]:
        """Int8 variants that are not in the release, and why."""
        return {kind: found.reason for kind, found in self.result.int8.items() if found.reason}

    @property
    def formats(self) -> dict[str, str]:
        """Format to file name, of what passed."""
        return standing(self.exported, self.result)

    @property
    def serve(self) -> dict[str, str]:
        """`latency` and `throughput` to the format that is recommended; empty when none is."""
        return dict(self.result.speed.serve) if self.result.speed else {}


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
            runner = await asyncio.wrap_future(run.cpp) if run.cpp is not None else CppResult(runner="")
            request = ValidateRequest(
                folder=str(exported.folder),
                formats=exported.formats,
                libraries=exported.result.libraries,
                inputs=exported.result.inputs,
                outputs=exported.result.outputs,
                metrics=run.job.metrics,
                gates=fixed_gates(run.job, custom=False),
                forbidden_modules=user_modules(run.job),
                forbidden_folder=run.project.folder,
                threads=run.job.threads,
                not_finite=run.job.parity.not_finite,
                refusals=run.job.parity.refusals,
                int8=int8_limits(run.job),
                cpp="off" if run.cpp is None else run.job.parity.cpp,
                runner=runner.runner,
                no_runner=runner.reason,
                log=str(work),
            )
            result: ValidateResult = decode(
                ValidateResult, await call_worker(run.fork_server, "validate", request, work)
            )
            if run.job.train.custom_metrics and result.passed:
                result = await _scored(run, exported, result, work)
            if result.passed and (run.job.export.serve != "none" or speed_gates(run.job) or result.int8):
                result = await _measured(run, exported, result, work)
            result.write(work / VERDICTS)
            stage.finish()
    result = ValidateResult.read(stage.path / VERDICTS)
    table = verdict_table(result.verdicts).text()
    if not result.passed:
        failed = [verdict for verdict in result.verdicts if verdict.ran and not verdict.passed]
        worst_of = ", ".join(f"{item.format} {item.gate} ({item.case})" for item in failed)
        report = await explain(run, exported, result)
        raise GateError(
            f"{run.job.name}: {len(failed)} of {len(result.verdicts)} gates failed: {worst_of}. "
            f"Nothing was registered or promoted.{f' Where and how much: {report}' if report else ''}",
            table,
        )
    validated = Validated(job=run.job, exported=exported, result=result, folder=stage.path, digest=stage.digest())
    _require_demanded(validated)
    for kind, why in validated.dropped.items():
        logger.warning("%s is not in the release: %s", kind, why)
    skipped: dict[str, list[str]] = {}
    for item in result.verdicts:
        if not item.ran:
            skipped.setdefault(f"{item.case}: {item.note}", []).append(item.format)
    if skipped:
        logger.warning("; ".join(f"{', '.join(formats)} {what}" for what, formats in skipped.items()))
    logger.info("all %d gates passed\n%s", sum(item.ran for item in result.verdicts), table)
    if result.speed is not None:
        logger.info(
            "speed, threads: %d, %s\n%s", result.speed.threads, result.speed.machine, speed_table(result.speed).text()
        )
    return validated


def _require_demanded(validated: Validated) -> None:
    """Raises GateError when the format that the job wants to serve with is not in the release."""
    serve = validated.job.export.serve
    if serve in ("auto", "none") or serve in validated.formats:
        return
    why = {**validated.exported.result.left_out, **validated.dropped}.get(serve, "it was not made")
    raise GateError(
        f"{validated.job.name}: export.serve: {serve} is not in the release: {why}. Nothing was registered or "
        "promoted; serve: auto takes what is fastest",
        verdict_table(validated.result.verdicts).text(),
    )


async def _scored(run: Run, exported: Exported, result: ValidateResult, work: Path) -> ValidateResult:
    """The result with the metrics that are in user code, which the clean room cannot import."""
    folder = work / "score"
    folder.mkdir()
    request = ScoreRequest(
        project=run.project,
        folder=str(exported.folder),
        formats=standing(exported, result),
        libraries=exported.result.libraries,
        inputs=exported.result.inputs,
        batch=run.job.export.batch,
        gates=fixed_gates(run.job, custom=True),
        threads=run.job.threads,
    )
    scored: ScoreResult = decode(ScoreResult, await call_worker(run.fork_server, "score", request, folder))
    result = replace(
        result,
        verdicts=[*result.verdicts, *(item for item in scored.verdicts if item.format not in INT8_OF)],
        metrics={kind: {**values, **scored.metrics[kind]} for kind, values in result.metrics.items()},
    )
    return worse_dropped(run.job, result, scored)


async def _measured(run: Run, exported: Exported, result: ValidateResult, work: Path) -> ValidateResult:
    """The result with how fast the artifacts are, side by side on this machine, and the limits on that."""
    folder = work / "measure"
    folder.mkdir()
    libraries = [str(exported.folder / name) for name in exported.result.libraries]
    request = measure_request(
        run.job,
        [
            Timed(name=kind, format=kind, file=str(exported.folder / file), libraries=libraries)
            for kind, file in standing(exported, result).items()
        ],
        golden=exported.folder / GOLDEN,
        inputs=exported.result.inputs,
        serve=run.job.export.serve,
        project=run.project,
    )
    speed: MeasureResult = decode(MeasureResult, await call_worker(run.fork_server, "measure", request, folder))
    for kind, speedups in speed.speedups.items():
        found = replace(result.int8[kind], speedups=speedups)
        result = replace(result, int8={**result.int8, kind: found})
        if kind in speed.too_slow:
            result = without(result, kind, speed.too_slow[kind])
    return replace(result, verdicts=[*result.verdicts, *speed.verdicts], speed=speed)

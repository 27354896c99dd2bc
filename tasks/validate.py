"""Stage: parity, quality and speed of every artifact, in processes without the training code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from torchworker.contract import (
    GOLDEN,
    INT8_OF,
    MeasureResult,
    ScoreResult,
    ValidateRequest,
    ValidateResult,
)
from train_and_ship.infra.errors import GateError
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.agreement import require_agreement, served_otherwise
from train_and_ship.registry.report.speed import speed_table
from train_and_ship.registry.run_folder import VALIDATE, VERDICTS, stage_inputs
from train_and_ship.registry.verdicts import asked_words, headline, passed_words, unproven_in_cpp, verdict_table
from train_and_ship.tasks.at_work import now_at
from train_and_ship.tasks.clean_room import ask_clean_room
from train_and_ship.tasks.explain import explain
from train_and_ship.tasks.requests import (
    fixed_gates,
    measure_request,
    score_request,
    speed_gates,
    timed_artifacts,
    validate_request,
)
from train_and_ship.tasks.results import Exported, Run, Trained, Validated, kept_formats
from train_and_ship.tasks.stage import WORKER_DELAYS, run_stage, stage_task
from train_and_ship.tasks.variants import without, worse_dropped
from train_and_ship.tasks.worker import ask_worker


@stage_task("validate", delays=WORKER_DELAYS)
async def validate(run: Run, trained: Trained, exported: Exported) -> Validated:
    """Hold every artifact against the model and the limits of the job that need no other release.

    Raises GateError with the whole table when any gate fails or could not be evaluated, or when what the gates measured
    contradicts what training did.
    """
    stage = StageFolder(run.folder, VALIDATE, stage_inputs(exported.digest, run.job.digest()))

    async def make(work: Path) -> ValidateResult:
        request = _request(run, exported, work)
        left = dict.fromkeys(request.formats)
        total = len(left)
        now_at("validate", left)

        def on_event(event: dict[str, Any]) -> None:
            left.pop(event["format"], None)
            now_at("validate", left, 1 - len(left) / total)
            get_run_logger().info("%s: held against the model in %.1f s", event["format"], event["seconds"])

        result = await ask_clean_room(run.rooms, request, work, run.cpp, on_event)
        if run.job.train.custom_metrics and result.passed:
            result = await _scored(run, trained, exported, result, work)
        if result.passed and (run.job.export.serve != "none" or speed_gates(run.job) or result.int8):
            now_at("validate", ["how fast each format is"])
            result = await _measured(run, exported, result, work)
        return result

    with run.timed("validate"):
        result = await run_stage(stage, ValidateResult, make, VERDICTS)
    if not result.passed:
        raise await _refusal(run, exported, result)
    require_agreement(run.job, trained.result, result)
    if otherwise := served_otherwise(run.job, trained.result, result):
        get_run_logger().warning("%s", otherwise)
    validated = Validated(job=run.job, exported=exported, result=result, digest=stage.digest())
    _require_demanded(validated)
    _log(validated)
    return validated


def _request(run: Run, exported: Exported, work: Path) -> ValidateRequest:
    return replace(
        validate_request(run.job, run.project, exported.folder, exported.result, work),
        weights=str(exported.weights),
        cpp=run.job.parity.cpp if run.cpp else "off",
    )


async def _refusal(run: Run, exported: Exported, result: ValidateResult) -> GateError:
    """What failed, with the report on parity where that is among it."""
    failed = [verdict for verdict in result.verdicts if verdict.ran and not verdict.passed]
    report = await explain(run, exported, result)
    return GateError(
        f"{run.job.name}: {len(failed)} of {len(result.verdicts)} gates failed: {headline(result.verdicts)}. "
        f"Nothing was registered or promoted.{f' Where and how much: {report}' if report else ''}",
        verdict_table(result.verdicts).text(),
    )


def _log(validated: Validated) -> None:
    """Say what passed, and what is not in the release or was not asked."""
    logger, result = get_run_logger(), validated.result
    for kind, why in validated.dropped.items():
        logger.warning("%s is not in the release: %s", kind, why)
    skipped: dict[str, list[str]] = {}
    for item in result.verdicts:
        if not item.ran:
            skipped.setdefault(f"{item.case}: {item.note}", []).append(item.format)
    if skipped:
        logger.warning("; ".join(f"{', '.join(formats)} {what}" for what, formats in skipped.items()))
    # What each of them measured is in the report.
    logger.info("%s", passed_words(result.verdicts))
    if asked := asked_words(result):
        logger.info("%s", asked)
    if result.independence:
        logger.info("%s", result.independence)
    if result.speed is not None:
        logger.info(
            "speed, threads: %d, %s\n%s",
            result.speed.threads,
            result.speed.machine,
            speed_table(result.speed, unproven_in_cpp(result.verdicts)).text(),
        )


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


async def _scored(run: Run, trained: Trained, exported: Exported, result: ValidateResult, work: Path) -> ValidateResult:
    """The result with the metrics that are in user code, which the clean room cannot import."""
    request = replace(
        score_request(run.job, run.project, exported.folder, exported.result),
        formats=kept_formats(exported, result),
        gates=fixed_gates(run.job, custom=True),
        errors=trained.result.validation_samples > result.validation_samples,
    )
    scored = await ask_worker(run.rooms.project, "score", request, ScoreResult, work / "score")
    result = replace(
        result,
        verdicts=[*result.verdicts, *(item for item in scored.verdicts if item.format not in INT8_OF)],
        metrics={kind: {**values, **scored.metrics[kind]} for kind, values in result.metrics.items()},
        standard_errors={
            kind: {**result.standard_errors.get(kind, {}), **scored.standard_errors.get(kind, {})}
            for kind in result.metrics
        },
    )
    return worse_dropped(run.job, result, scored)


async def _measured(run: Run, exported: Exported, result: ValidateResult, work: Path) -> ValidateResult:
    """The result with how fast the artifacts are, side by side on this machine, and the limits on that."""
    request = measure_request(
        run.job,
        timed_artifacts(exported.folder, kept_formats(exported, result), exported.result.libraries),
        golden=exported.folder / GOLDEN,
        inputs=exported.result.inputs,
        serve=run.job.export.serve,
        project=run.project,
    )
    # Side by side, so all of them where the most particular of them loads.
    room = run.rooms.for_all(kept_formats(exported, result), exported.result.libraries)
    speed = await ask_worker(room, "measure", request, MeasureResult, work / "measure")
    for kind, speedups in speed.speedups.items():
        found = replace(result.int8[kind], speedups=speedups)
        result = replace(result, int8={**result.int8, kind: found})
        if kind in speed.too_slow:
            result = without(result, kind, speed.too_slow[kind])
    return replace(result, verdicts=[*result.verdicts, *speed.verdicts], speed=speed)

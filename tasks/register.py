"""Stage: assemble the release and record it as one MLflow model version with every format."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from torchworker.contract import EVENTS, GOLDEN, WEIGHTS, InspectResult, TensorSpec, TrainResult, read_with
from train_and_ship.infra.provenance import project_place
from train_and_ship.infra.rundir import MANIFEST as STAGE
from train_and_ship.infra.rundir import StageFolder, file_sha256
from train_and_ship.registry.data.checks import groups_in_both, require_held_out, shared_samples
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.lineage import Inputs, config_digest
from train_and_ship.registry.release.files import file_table
from train_and_ship.registry.release.labels import labels_of
from train_and_ship.registry.release.manifest import (
    DATA,
    ENVIRONMENT,
    JOB,
    LINEAGE,
    SHIPPED,
    VERDICTS,
    Manifest,
    build_manifest,
)
from train_and_ship.registry.release.onnx_header import onnx_versions
from train_and_ship.registry.report.description import describe
from train_and_ship.registry.report.speed import speed_metrics
from train_and_ship.registry.report.training_sections import shipped_words
from train_and_ship.registry.run_folder import FILES, REGISTERED, RELEASE, Registration, stage_inputs, write_fact
from train_and_ship.registry.tracking import versions as mlflow_versions
from train_and_ship.registry.tracking.connection import AwayError, check_reachable
from train_and_ship.registry.tracking.curves import Point, file_points, shipped_of
from train_and_ship.registry.tracking.runs import TAG_HASHES
from train_and_ship.registry.tracking.versions import RegisteredVersion, VersionRecord
from train_and_ship.tasks.fingerprints import data_fingerprint, snapshot_fingerprint
from train_and_ship.tasks.requests import run_params
from train_and_ship.tasks.results import Inspected, Registered, Run, Trained, Validated
from train_and_ship.tasks.stage import stage_task

PAUSES = (2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds before an MLflow that is away is asked again; the last one from then on."""
SAY_SECONDS = 600
"""Between two lines of the log that say so."""


@stage_task("register", delays=(1, 5, 15))
async def register(run: Run, inspected: Inspected, trained: Trained, validated: Validated) -> Registered:
    """Assemble the release folder and register it; a retry finds the version that it already made.

    Args:
        run: whose folder the release is assembled in.
        inspected: what the data is like.
        trained: weights and history.
        validated: the artifacts that passed.

    Raises:
        AwayError: MLflow did not answer for as long as a run waits for it.
        ServiceError: MLflow answers with a fault.
        JobError: the data could not be read.
        GateError: most of the held-out data is training data, and the job does not allow it.
    """
    with run.timed("register"):
        facts = await inspected.facts()
        require_held_out(run.job.data.checks, facts.overlap, facts.validation.samples)
        if shared := shared_samples(facts.overlap, facts.validation.samples):
            get_run_logger().warning("%s", shared)
        if known := groups_in_both(facts):
            get_run_logger().warning("%s", known)
        data = snapshot_fingerprint(run.snapshot) if run.snapshot else data_fingerprint(facts)
        inputs = Inputs(
            code=trained.made_from.code,
            data=data,
            config=config_digest(run.job),
            environment=trained.made_from.packages,
        )
        folder = _assemble(run, trained, validated, facts, inputs)
        first = validated.exported.result.outputs[0]
        labels, why_not = labels_of(run.job.export.labels, facts.classes, first, run.job.data.factory)
        if why_not:
            get_run_logger().warning("%s", why_not)
        manifest = build_manifest(
            folder,
            model=run.job.name,
            formats=validated.formats,
            signature=_signature(validated, labels),
            metrics=validated.quality,
            serve=validated.serve,
        )
        description = _description(run, trained, validated, manifest)
        shown = await asyncio.to_thread(run.live.stop)
        # What MLflow could not be told while it happened.
        points = [] if shown else file_points(trained.folder / EVENTS)
        record = _record(run, trained, validated, folder, manifest, description, points, shared)
        version = await _registered(record, run)
    get_run_logger().info("registered %s version %s: %s", run.job.name, version.version, version.version_url)
    registration = Registration(
        stage=file_sha256(folder.parent / STAGE),
        release=manifest.release,
        version=version.version,
        version_url=version.version_url,
        run_url=version.run_url,
    )
    write_fact(run.folder, REGISTERED, registration)
    return Registered(validated=validated, folder=folder, manifest=manifest, version=version, description=description)


async def _registered(record: VersionRecord, run: Run) -> RegisteredVersion:
    """The version. An MLflow that is away is waited for: all else is done, and hours of training are in this run."""
    settings, logger = run.settings, get_run_logger()
    wait, began, said = settings.mlflow_wait_seconds, math.inf, 0.0
    pauses = itertools.chain(PAUSES, itertools.repeat(PAUSES[-1]))
    missed = False
    while True:
        try:
            if missed:
                # Quicker than MLflow's own client.
                await asyncio.to_thread(check_reachable, settings.mlflow_url)
            version = await asyncio.to_thread(mlflow_versions.register, record, settings.mlflow_url)
        except AwayError as error:
            # From the first time on that it was missed: MLflow's own client tries for 8 s.
            began = min(began, time.monotonic())
            waited = time.monotonic() - began
            if waited >= wait:
                raise AwayError(
                    f"{error} A run waits {wait} s for it (SHIP_MLFLOW_WAIT_SECONDS). Nothing is lost: what was "
                    f"trained and proven is in {run.folder}. When MLflow is back, `ship run … --resume "
                    f"{run.folder.name}` or `prefect flow-run retry {run.flow_run_id}` registers it, and goes on from "
                    "there.",
                    retryable=False,
                ) from error
            if not missed:
                logger.warning(
                    "%s Training, export and proof are done, and wait up to %d s for it (SHIP_MLFLOW_WAIT_SECONDS).",
                    error, wait,
                )  # fmt: skip
            elif waited - said >= SAY_SECONDS:
                said = waited
                logger.warning("MLflow is still away after %d s; waiting %d s more.", waited, wait - waited)
            missed = True
            await asyncio.sleep(min(next(pauses), wait - waited))
            continue
        if missed:
            logger.info("MLflow is back after %d s", time.monotonic() - began)
        return version


def _assemble(run: Run, trained: Trained, validated: Validated, facts: InspectResult, inputs: Inputs) -> Path:
    """The files of the release, hard links where they already exist."""
    stage = StageFolder(run.folder, RELEASE, stage_inputs(validated.digest))
    if not stage.is_complete():
        files = stage.begin() / FILES
        files.mkdir()
        exported = validated.exported
        there = {path.name for path in exported.folder.iterdir()}
        artifacts = [name for file in validated.formats.values() for name in read_with(file, there)]
        for name in [*artifacts, *exported.result.libraries, GOLDEN]:
            os.link(exported.folder / name, files / name)
        for path in sorted((exported.folder / SHIPPED).rglob("*")):
            if path.is_file():
                target = files / path.relative_to(exported.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
        os.link(trained.weights, files / WEIGHTS)
        _write_json(files / JOB, run.job.model_dump(mode="json"))
        _write_json(files / VERDICTS, dataclasses.asdict(validated.result))
        _write_json(files / LINEAGE, _lineage(run, trained, validated, inputs))
        _write_json(files / DATA, _summary(facts))
        lock = [f"{name}=={version}" for name, version in inputs.environment.items()]
        (files / ENVIRONMENT).write_text("\n".join(lock) + "\n")
        stage.finish()
    return stage.path / FILES


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _summary(facts: InspectResult) -> dict[str, Any]:
    """What the next candidate's data is held against: counts and quantiles, no samples."""
    return dataclasses.asdict(replace(facts, seconds=0.0, drawn=None, validation=replace(facts.validation, columns={})))


def _lineage(run: Run, trained: Trained, validated: Validated, inputs: Inputs) -> dict[str, Any]:
    result, exported, formats = trained.result, validated.exported, validated.formats
    files = trained.made_from.files
    if files is not None:
        files = files.touched_again(exported.result.touched, Path(run.project.folder))
    return {
        "inputs": inputs.recorded(),
        **({"files": dataclasses.asdict(files)} if files is not None else {}),
        "start": trained.start,
        "git_commit": trained.made_from.git_commit,
        "shipping_git_commit": run.git_commit,
        "flow_run_id": run.origin,
        "begun": run.begun,
        "project": project_place(Path(run.project.folder)),
        "onnx": onnx_versions(exported.folder / onnx) if (onnx := formats.get("onnx")) else {},
        "job_digest": run.job.digest(),
        "data_fingerprint": result.data_fingerprint,
        "train_samples": result.train_samples,
        "validation_samples": result.validation_samples,
        "training_environment": dict(result.environment),
        "environments": dataclasses.asdict(run.rooms.environments(formats, exported.result.libraries)),
        "history": [dict(row) for row in result.history],
        # Where nothing was chosen it is the last row.
        **({"shipped_epoch": result.shipped_epoch, "chosen_by": result.chosen_by} if result.chosen_by else {}),
    }


def _specs(tensors: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in tensors]


def _signature(validated: Validated, labels: Sequence[str]) -> dict[str, Any]:
    reference = validated.exported.result
    dims = [{"name": dim.name, "min": dim.min, "max": dim.max} for dim in reference.dims]
    # Whoever makes a view of the release later knows that requests must not be put together.
    coupled = {"coupled": True} if validated.job.coupled else {}
    named = {"labels": labels} if labels else {}
    return {"inputs": _specs(reference.inputs), "outputs": _specs(reference.outputs), "dims": dims, **coupled, **named}


def _description(run: Run, trained: Trained, validated: Validated, manifest: Manifest) -> str:
    return describe(
        model=run.job.name,
        release=manifest.release,
        formats=manifest.formats,
        sizes=_sizes(manifest),
        result=validated.result,
        training=shipped_of(trained.result),
        links={"Prefect run": run.flow_run_url},
        captured={kind: validated.exported.result.artifacts[kind].said for kind in validated.formats},
        left_out={**validated.exported.result.left_out, **validated.dropped},
        shipped=shipped_words(run.job, trained.result) if trained.result.chosen_by else "",
        environments=run.rooms.environments(validated.formats, validated.exported.result.libraries).in_words(),
    )


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each file; of those that the job ships, which may be a thousand, in one line."""
    shipped = manifest.shipped
    sizes = {name: entry.bytes for name, entry in manifest.files.items() if name not in shipped}
    if shipped:
        sizes[f"{SHIPPED}/ ({len(shipped)})"] = sum(entry.bytes for entry in shipped.values())
    return sizes


def _hashes(manifest: Manifest) -> dict[str, str]:
    """Tag: SHA-256 of each file, and of the table of those that the job ships, of which there may be a thousand."""
    shipped = manifest.shipped
    hashes = {name: entry.sha256 for name, entry in manifest.files.items() if name not in shipped}
    if shipped:
        hashes[SHIPPED] = hashlib.sha256(canonical_json(file_table(shipped))).hexdigest()
    return {TAG_HASHES: json.dumps(hashes, indent=1)}


def _measured(result: TrainResult) -> dict[str, float]:
    """Of the epoch that ships: how good it was, on which data."""
    return {name: value for name, value in shipped_of(result).items() if name.startswith(("train_", "validation_"))}


def _choice(job: Job, result: TrainResult) -> dict[str, str]:
    """Tags; none where the last epoch ships whatever it is like."""
    if not result.chosen_by:
        return {}
    return {"shipped.epoch": str(result.shipped_epoch), "shipped.why": shipped_words(job, result)}


def _record(
    run: Run,
    trained: Trained,
    validated: Validated,
    folder: Path,
    manifest: Manifest,
    description: str,
    points: Sequence[Point],
    shared: str,
) -> VersionRecord:
    job, result = run.job, trained.result
    artifacts = set(manifest.formats.values())
    return VersionRecord(
        model=job.name,
        folder=folder,
        formats=manifest.formats,
        extra_files=[name for name in manifest.files if name not in artifacts],
        signature=manifest.signature,
        params=run_params(job),
        history=result.history,
        shipped_epoch=result.shipped_epoch,
        points=points,
        metrics={
            f"{kind}.{name}": value
            for kind, values in validated.result.metrics.items()
            for name, value in values.items()
        }
        | (speed_metrics(validated.result.speed) if validated.result.speed else {})
        # Of a run MLflow shows the end of each curve, which is another epoch's.
        | ({f"shipped.{name}": value for name, value in _measured(result).items()} if result.chosen_by else {}),
        dataset_name=job.data.factory,
        dataset_digest=result.data_fingerprint,
        dataset_source=f"{job.data.factory} at {trained.made_from.git_commit}",
        dataset_profile={"train_samples": result.train_samples, "validation_samples": result.validation_samples},
        tags={
            "git_commit": trained.made_from.git_commit,
            "flow_run_id": run.origin,
            "flow_run_url": run.flow_run_url,
            "release": manifest.release,
            **({"data.overlap": shared} if shared else {}),
            **_choice(job, result),
            **{f"serve.{purpose}": kind for purpose, kind in manifest.serve.items()},
            **_hashes(manifest),
        },
        description=description,
        run_name=run.flow_run_name,
    )

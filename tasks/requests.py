"""From the job file to what worker processes and MLflow are told. No Prefect here: `ship check` uses it too."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchworker.contract import (
    PROBES,
    SPEED_GATES,
    VALIDATION,
    CustomMetric,
    DynamicDim,
    Entrypoint,
    ExportRequest,
    ExportResult,
    Gate,
    InspectRequest,
    Int8Limits,
    MeasureRequest,
    ParameterGroup,
    Project,
    Reference,
    RehearsedRelease,
    RehearseRequest,
    Resampling,
    ScoreRequest,
    TensorSpec,
    Timed,
    TrainSettings,
    ValidateRequest,
)
from train_and_ship.infra.provenance import is_library
from train_and_ship.registry.job.base import Factory
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.train import TORCHMETRIC
from train_and_ship.registry.job.train import CustomMetric as MetricOfJob

LOADS = 3
"""Processes in which loading is measured where a gate asks for its time."""


def project_of(job: Job, folder: Path, snapshot: Path | None = None) -> Project:
    """The user code that the job names.

    Args:
        job: what names it.
        folder: absolute path of the project folder.
        snapshot: folder of the job's verified data; None when it has no snapshot.
    """
    return Project(
        name=job.name,
        folder=str(folder),
        model=_reference(job.model, "model.factory"),
        data=_reference(job.data, "data.factory"),
        collate=_optional(job.data.collate, "data.collate"),
        sampler=_optional(job.data.sampler, "data.sampler"),
        sharded=job.data.sharded,
        group=_optional(job.data.group, "data.group"),
        loss=_named(job.train.loss, "train.loss.factory"),
        metrics=job.metrics,
        snapshot=str(snapshot) if snapshot is not None else "",
        custom_metrics=[
            CustomMetric(name=item.label, reference=_metric(item), better=item.better)
            for item in job.train.custom_metrics
        ],
        coupled=job.coupled,
        env=job.env,
        extras=_optional(job.export.extras, "export.extras"),
        serving=_optional(job.export.serving, "export.serving"),
        raw=_optional(job.data.raw, "data.raw"),
        for_live=_optional(job.data.for_live, "data.for_live"),
        labels=job.export.labels,
    )


def _reference(factory: Factory, where: str) -> Reference:
    return Reference(target=factory.factory, args=factory.args, where=where)


def _metric(item: MetricOfJob) -> Reference:
    named = item.factory == TORCHMETRIC
    return _reference(item, f"train.metrics: {item.label}" if named else "train.metrics.factory")


def _optional(choice: str | Factory | None, where: str) -> Reference | None:
    if isinstance(choice, str):
        return Reference(target=choice, where=where)
    return None if choice is None else _reference(choice, f"{where}.factory")


def _named(choice: str | Factory, where: str) -> str | Reference:
    return choice if isinstance(choice, str) else _reference(choice, where)


def train_settings(job: Job) -> TrainSettings:
    """How to train: what the job file and the worker call alike is taken as it is."""
    train = job.train
    alike = {name: getattr(train, name) for name in _names(TrainSettings) & type(train).model_fields.keys()}
    settings: dict[str, Any] = {
        **alike,
        "entrypoint": _entrypoint(job),
        "epochs": train.epochs or 0,
        "optimizer": _named(train.optimizer, "train.optimizer.factory"),
        "schedule": _named(train.schedule, "train.schedule.factory"),
        "threads": job.threads,
        "checkpoint_seconds": train.checkpoint.seconds,
        "checkpoint_steps": train.checkpoint.steps,
        "checkpoint_keep": train.checkpoint.keep,
        "warmup": train.warms_up,
        "weights": train.ships,
        "groups": [ParameterGroup(names=group.names, options=group.options) for group in train.groups],
        "watched": job.watched[0],
        "watched_better": job.watched[1],
    }
    return TrainSettings(**settings)


def _names(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def required_formats(job: Job) -> tuple[str, ...]:
    """Formats without which there is no release; `auto` leaves out what cannot be made."""
    return () if job.export.formats == "auto" else job.export.wanted


def export_request(job: Job, project: Project, folder: Path, *, weights: str) -> ExportRequest:
    """Every format of a job.

    Args:
        job: which formats, and how.
        project: the user's code.
        folder: where to.
        weights: of the trained model; empty for the model as its factory makes it.
    """
    asked, int8 = job.export, job.export.int8
    return ExportRequest(
        project=project,
        folder=str(folder),
        weights=weights,
        formats=asked.wanted,
        auto=asked.formats == "auto",
        libraries=[str(Path(project.folder, name)) for name in asked.libraries],
        batch=asked.batch,
        seed=job.train.seed,
        validation_limit=asked.validation_samples,
        dynamic=dynamic_dims(job),
        max_batch=asked.max_batch,
        int8=int8.wanted if int8 is not None else (),
        calibration_samples=int8.samples if int8 is not None else 0,
        external_data=asked.external_data,
    )


def validate_request(job: Job, project: Project, folder: Path, exported: ExportResult, log: Path) -> ValidateRequest:
    """Everything that is asked of artifacts in the clean room, in Python.

    Args:
        job: whose gates.
        project: user code that the process must not import.
        folder: with the artifacts and the reference data.
        exported: what is there.
        log: folder for logs.
    """
    return ValidateRequest(
        folder=str(folder),
        formats={kind: artifact.file for kind, artifact in exported.artifacts.items()},
        libraries=exported.libraries,
        inputs=exported.inputs,
        outputs=exported.outputs,
        metrics=job.metrics,
        gates=fixed_gates(job, custom=False),
        forbidden_modules=user_modules(job, Path(project.folder)),
        forbidden_folder=project.folder,
        threads=job.threads,
        not_finite=job.parity.not_finite,
        refusals=job.parity.refusals,
        relative=job.parity.relative,
        min_samples=job.parity.min_samples,
        max_batch=job.export.max_batch,
        weight_names=exported.weight_names,
        int8=int8_limits(job),
        log=str(log),
    )


def score_request(job: Job, project: Project, folder: Path, exported: ExportResult) -> ScoreRequest:
    """Metrics in user code, of every artifact; no limits are asked.

    Args:
        job: whose metrics.
        project: the user's code.
        folder: with the artifacts and the held-out samples.
        exported: what is there.
    """
    return ScoreRequest(
        project=project,
        folder=str(folder),
        formats={kind: artifact.file for kind, artifact in exported.artifacts.items()},
        libraries=exported.libraries,
        inputs=exported.inputs,
        batch=job.export.batch,
        gates=(),
        threads=job.threads,
    )


def dynamic_dims(job: Job) -> list[DynamicDim]:
    """The declared dynamic dimensions beside the batch."""
    return [
        DynamicDim(
            name=name,
            min=dimension.min,
            max=dimension.max,
            axes={tensor: axes if isinstance(axes, tuple) else (axes,) for tensor, axes in dimension.axes.items()},
        )
        for name, dimension in job.export.dynamic.items()
    ]


def _entrypoint(job: Job) -> Entrypoint | None:
    if job.train.entrypoint is None:
        return None
    function = Reference(target=job.train.entrypoint, args=job.train.args, where="train.entrypoint")
    return Entrypoint(function=function, job=job.model_dump(mode="json"))


def fixed_gates(job: Job, *, custom: bool) -> list[Gate]:
    """Gates that a candidate can be held against alone; `vs_live` waits for the live release.

    custom: those on metrics in user code, or on all others. Limits on speed are `speed_gates`.
    """
    theirs = {metric.label for metric in job.train.custom_metrics}
    return [
        Gate(name=name, min=gate.min, max=gate.max)
        for name, gate in job.gates.items()
        if (gate.min is not None or gate.max is not None) and name not in SPEED_GATES and (name in theirs) == custom
    ]


def speed_gates(job: Job) -> list[Gate]:
    """Fixed limits on times, sizes and memory."""
    chosen = [(name, gate.max) for name, gate in job.gates.items() if name in SPEED_GATES]
    return [Gate(name=name, max=limit) for name, limit in chosen if limit is not None]


def int8_limits(job: Job) -> Int8Limits | None:
    """What is asked of int8 variants; None when none are tried."""
    asked = job.export.int8
    return Int8Limits(**asked.model_dump(include=_names(Int8Limits))) if asked is not None else None


BATCHES = (1, 8, 64)
"""Batch sizes at which artifacts are measured."""


def inspect_request(job: Job, project: Project) -> InspectRequest:
    """Read the data, and count what is outside the ranges of `data.checks`."""
    tensors = job.data.checks.tensors if job.data.checks is not None else {}
    ranges = {name: (asked.min, asked.max) for name, asked in tensors.items()}
    return InspectRequest(project=project, train=train_settings(job), ranges=ranges, most=job.export.validation_samples)


def measure_request(
    job: Job, subjects: Sequence[Timed], *, golden: Path, inputs: Sequence[TensorSpec], serve: str, project: Project
) -> MeasureRequest:
    """Measure these artifacts side by side.

    Args:
        job: whose gates and threads count.
        subjects: the artifacts, each with its format and its file.
        golden: file of reference tensors.
        inputs: of the model, by name, with dtype and shape (`[batch, …]`).
        serve: `export.serve` of the job; `none` recommends nothing.
        project: user code that the measuring process must not import.
    """
    return MeasureRequest(
        subjects=subjects,
        golden=str(golden),
        inputs=inputs,
        batches=BATCHES,
        threads=job.serve_threads,
        serve=serve,
        gates=speed_gates(job),
        speedup=job.export.int8.speedup if job.export.int8 is not None else 1.0,
        # Some archives take seconds to load: no run waits for a median that nothing is decided by.
        loads=LOADS if "load_ms" in job.gates else 1,
        dims=dynamic_dims(job),
        max_batch=job.export.max_batch,
        forbidden_modules=user_modules(job, Path(project.folder)),
        forbidden_folder=project.folder,
    )


def timed_artifacts(folder: Path, formats: Mapping[str, str], libraries: Sequence[str], side: str = "") -> list[Timed]:
    """Artifacts as subjects of a measurement.

    Args:
        folder: that holds them.
        formats: format to file name.
        libraries: file names of the operators that they need.
        side: a word in front of the format, where two releases are measured.
    """
    paths = [str(folder / name) for name in libraries]
    return [
        Timed(name=f"{side} {kind}".lstrip(), format=kind, file=str(folder / file), libraries=paths)
        for kind, file in formats.items()
    ]


def rehearse_request(
    job: Job | None,
    candidate: RehearsedRelease,
    live: RehearsedRelease | None,
    samples: Path | None,
    forbidden_folder: str,
    resampling: Resampling | None = None,
) -> RehearseRequest:
    """Try a release as it came from the bucket.

    Args:
        job: the job that made it; None asks for no metric.
        candidate: the release.
        live: what it is held against; None when nothing is live, or nobody compares.
        samples: folder of held-out samples and of probes; None where there are none.
        forbidden_folder: absolute path of a folder from which the process must not import.
        resampling: how samples are drawn anew, where the difference is tested against chance.
    """
    return RehearseRequest(
        candidate=candidate,
        live=live,
        validation=str(samples / VALIDATION) if samples is not None else None,
        moved=str(samples / PROBES) if samples is not None else None,
        metrics=job.metrics if job is not None else (),
        forbidden_modules=user_modules(job, Path(forbidden_folder)) if job is not None else [],
        forbidden_folder=forbidden_folder,
        # The job may be another's: more than there are cores help nobody.
        threads=min(job.threads, len(os.sched_getaffinity(0))) if job is not None else 1,
        sqnr_db=job.export.int8.sqnr_db if job is not None and job.export.int8 is not None else 0.0,
        # Whoever made the release must not know what is asked.
        seed=secrets.randbits(32),
        resampling=resampling,
    )


def user_modules(job: Job, folder: Path) -> list[str]:
    """Top-level modules of the user's own that the job refers to: `torch.optim:SGD` is none.

    Args:
        job: with references.
        folder: of the project, where Python looks first.
    """
    train = job.train
    parts = [job.model, job.data, train.loss, train.optimizer, train.schedule, *(train.metrics or ())]
    named = [item.factory for item in parts if isinstance(item, Factory)]
    data = job.data
    for choice in (data.collate, data.sampler, data.group, data.raw, data.for_live):
        if choice is not None:
            named.append(choice if isinstance(choice, str) else choice.factory)
    named += [target for target in (train.entrypoint, job.export.extras, job.export.serving) if target is not None]
    modules = {target.partition(":")[0].partition(".")[0] for target in named}
    return sorted(module for module in modules if not is_library(module, folder))


def run_params(job: Job) -> dict[str, str]:
    """What MLflow lists as the params of a run."""
    train = job.train.model_dump(mode="json")
    return {
        "model": job.model.factory,
        "data": job.data.factory,
        **{f"model.{name}": str(value) for name, value in job.model.args.items()},
        **{f"data.{name}": str(value) for name, value in job.data.args.items()},
        **{f"train.{name}": str(value) for name, value in train.items() if value is not None and name != "args"},
        **({"train.weights": "best"} if job.train.ships == "best" else {}),
        **{f"train.args.{name}": str(value) for name, value in job.train.args.items()},
        "export.formats": job.export.formats if job.export.formats == "auto" else ",".join(job.export.formats),
        "export.serve": job.export.serve,
        **({"export.serving": job.export.serving} if job.export.serving is not None else {}),
        **({"export.quantize": ",".join(job.export.int8.wanted)} if job.export.int8 is not None else {}),
    }

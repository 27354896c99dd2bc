"""From the job file to what worker processes and MLflow are told. No Prefect here: `ship check` uses it too."""

from __future__ import annotations

from pathlib import Path

from registry.job import Job
from registry.parts import Factory
from torchworker.contract import Gate, Project, Reference, TrainSettings


def project_of(job: Job, folder: Path) -> Project:
    """The user code that the job names. folder: absolute project folder."""
    return Project(
        name=job.name,
        folder=str(folder),
        model=_reference(job.model, "model.factory"),
        data=_reference(job.data, "data.factory"),
        loss=_named(job.train.loss, "train.loss.factory"),
        metrics=job.metrics,
    )


def _reference(factory: Factory, where: str) -> Reference:
    return Reference(target=factory.factory, args=factory.args, where=where)


def _named(choice: str | Factory, where: str) -> str | Reference:
    return choice if isinstance(choice, str) else _reference(choice, where)


def train_settings(job: Job) -> TrainSettings:
    train = job.train
    return TrainSettings(
        processes=train.processes,
        epochs=train.epochs,
        batch_size=train.batch_size,
        seed=train.seed,
        optimizer=_named(train.optimizer, "train.optimizer.factory"),
        learning_rate=train.learning_rate,
        threads=job.threads,
        data_workers=train.data_workers,
        schedule=_named(train.schedule, "train.schedule.factory"),
        accumulate=train.accumulate,
        clip_norm=train.clip_norm,
        early_stopping=train.early_stopping,
        checkpoint_seconds=train.checkpoint.seconds,
        checkpoint_steps=train.checkpoint.steps,
        checkpoint_keep=train.checkpoint.keep,
        restarts=train.restarts,
        hang_seconds=train.hang_seconds,
        collective_seconds=train.collective_seconds,
    )


def fixed_gates(job: Job) -> list[Gate]:
    """Gates that a candidate can be held against alone; `vs_live` waits for the live release."""
    return [
        Gate(name=name, min=gate.min, max=gate.max)
        for name, gate in job.gates.items()
        if gate.min is not None or gate.max is not None
    ]


def user_modules(job: Job) -> list[str]:
    """Top-level modules that the job refers to."""
    train = job.train
    factories = [job.model, job.data, train.loss, train.optimizer, train.schedule]
    return sorted({item.factory.partition(":")[0].partition(".")[0] for item in factories if isinstance(item, Factory)})


def run_params(job: Job) -> dict[str, str]:
    """What MLflow lists as the params of a run."""
    train = job.train.model_dump(mode="json")
    return {
        "model": job.model.factory,
        "data": job.data.factory,
        **{f"model.{name}": str(value) for name, value in job.model.args.items()},
        **{f"data.{name}": str(value) for name, value in job.data.args.items()},
        **{f"train.{name}": str(value) for name, value in train.items() if value is not None},
        "export.formats": ",".join(job.export.formats),
    }

"""The worker stages of one job file, one by one and without Prefect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchworker.contract import (
    FORMAT_FILES,
    WEIGHTS,
    Artifact,
    ExportRequest,
    ExportResult,
    TrainRequest,
    TrainResult,
    ValidateRequest,
    ValidateResult,
    decode,
)
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import (
    dynamic_dims,
    fixed_gates,
    int8_limits,
    project_of,
    train_settings,
    user_modules,
)
from train_and_ship.tasks.worker import call_worker

FORMATS = tuple(kind for kind in FORMAT_FILES if kind != "executorch")
"""Those that need no largest batch."""
EACH_FORMATS = pytest.mark.parametrize(
    "formats",
    [
        pytest.param(tuple(kind for kind in FORMATS if kind != "aoti"), id="not compiled"),
        pytest.param(("aoti",), id="aoti", marks=pytest.mark.soak),
    ],
)
"""AOTInductor compiles C++ for twenty seconds; `test_exports.py` asks it together with the others."""
ONE = {"epochs": 1, "processes": 1, "batch_size": 32}


@dataclass
class WorkerStages:
    """Drives the worker stages of one job file."""

    fork_server: ForkServer
    job_file: Path
    folder: Path

    def __post_init__(self) -> None:
        self.job, self.project_folder = load_job(self.job_file)
        self.project = project_of(self.job, self.project_folder)
        for name in ("train", "export", "validate"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.result: ExportResult | None = None
        self.weights = ""
        """Of the training, or as the factory makes them."""

    def train(self) -> TrainResult:
        folder = self.folder / "train"
        request = TrainRequest(
            project=self.project,
            train=train_settings(self.job),
            folder=str(folder),
            checkpoints=str(self.folder / "c"),
            dynamic=dynamic_dims(self.job),
        )
        result: TrainResult = decode(TrainResult, asyncio.run(call_worker(self.fork_server, "train", request, folder)))
        self.weights = str(folder / WEIGHTS)
        return result

    def export(self, *kinds: str) -> dict[str, Artifact]:
        folder = self.folder / "export"
        request = ExportRequest(
            project=self.project,
            folder=str(folder),
            weights=self.weights,
            formats=kinds,
            batch=8,
            seed=0,
            validation_limit=1000,
            dynamic=dynamic_dims(self.job),
            max_batch=self.job.export.max_batch,
            auto=self.job.export.formats == "auto",
            libraries=[str(self.project_folder / name) for name in self.job.export.libraries],
            int8=self.job.export.int8.wanted if self.job.export.int8 is not None else (),
            external_data=self.job.export.external_data,
        )
        self.result = decode(ExportResult, asyncio.run(call_worker(self.fork_server, "export", request, folder)))
        return dict(self.result.artifacts)

    def validate(self, cpp: str = "off", runner: str = "", no_runner: str = "") -> ValidateResult:
        assert self.result is not None
        request = ValidateRequest(
            folder=str(self.folder / "export"),
            formats={kind: artifact.file for kind, artifact in self.result.artifacts.items()},
            libraries=self.result.libraries,
            inputs=self.result.inputs,
            outputs=self.result.outputs,
            metrics=self.job.metrics,
            gates=fixed_gates(self.job, custom=False),
            forbidden_modules=user_modules(self.job, self.project_folder),
            forbidden_folder=str(self.project_folder),
            threads=1,
            not_finite=self.job.parity.not_finite,
            refusals=self.job.parity.refusals,
            max_batch=self.job.export.max_batch,
            relative=self.job.parity.relative,
            int8=int8_limits(self.job),
            cpp=cpp,
            runner=runner,
            no_runner=no_runner,
            log=str(self.folder / "validate"),
        )
        reply = asyncio.run(call_worker(self.fork_server, "validate", request, self.folder / "validate"))
        result: ValidateResult = decode(ValidateResult, reply)
        return result


OpenStages = Callable[..., WorkerStages]

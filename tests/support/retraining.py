"""A model that is retrained again and again, in this process and against the real stack."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from prefect.client.schemas.objects import State

from tests.support.projects import CODE, write_project
from train_and_ship.flows.retrain import retrain
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import Decision, read_decisions
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.tasks.results import RetrainResult

POOR = {"epochs": 1, "processes": 1, "batch_size": 32, "learning_rate": 1e-4}
"""`train` of a model that learns next to nothing."""
MODEL = "nightly"


class Project:
    """A model whose code and job change from run to run."""

    def __init__(self, folder: Path, store: ObjectStore, model: str = MODEL) -> None:
        self.folder, self.store, self.model = folder, store, model

    def retrain(self, why: str = "", code: str = CODE, force: bool = False, **job: Any) -> State[RetrainResult]:
        """Retrain in this process; the state in which the flow ended."""
        path = self.write(code, **job)
        ended = asyncio.run(retrain(job=str(path), why=why, force=force, return_state=True))
        return cast("State[RetrainResult]", ended)

    def write(self, code: str = CODE, **job: Any) -> Path:
        """Code and job file as they are from now on; the job file."""
        job = {"export": {"formats": ["torchscript"]}, "parity": {"cpp": "off"}, **job}
        return write_project(self.folder, code, name=self.model, **job)

    @property
    def live(self) -> Pointer:
        pointer = read_pointer(Channel(self.store, self.model, "prod"))
        assert pointer is not None
        return pointer

    def decisions(self) -> list[Decision]:
        return read_decisions(Channel(self.store, self.model, "prod"), 100)

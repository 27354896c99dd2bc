"""The Python API: `from train_and_ship.api import Job, check, run`.

    job = Job.load("job.yaml")                      # or Job(name="digits", model={"factory": "digits:build_model"}, …)
    print(check(job))                               # what `ship check` says
    shipped = run(job)                              # what `ship run` does: same run folder, same record, same report
    rollback("digits", why="errors since 14:00")

It is used in the environment of the tool, beside the stack that `ship up` starts or the services that the environment
names; in a script (without a guard of `__main__`), an interpreter or a notebook. Code of a job only ever runs in child
processes, which import it: factories are named, `module:attribute`, and never handed over.

Paths in a job are relative to the folder of the file that it was loaded from, else to the current folder; `folder=`
says another one. What a person did wrong is raised as one of the classes below UserError, with the text that the
command prints; nothing exits. What is returned is frozen, and prints as a table in a terminal and in a notebook.
"""

from __future__ import annotations

from train_and_ship.api.calls import check, history, live, promote, retrain, rollback, run
from train_and_ship.api.job import Job
from train_and_ship.infra.errors import (
    GateError,
    JobError,
    ReleaseError,
    RequestError,
    ServiceError,
    SettingsError,
    ShipError,
    UserError,
)
from train_and_ship.registry.job.base import Factory
from train_and_ship.registry.job.data import Checks, Snapshot
from train_and_ship.registry.job.export import Export
from train_and_ship.registry.job.gates import Gate
from train_and_ship.registry.job.job import Data, Deploy, Release, Retrain
from train_and_ship.registry.job.observe import Observe
from train_and_ship.registry.job.parity import Parity
from train_and_ship.registry.job.train import Train
from train_and_ship.ship.results import Checked, History, Move, Retrained, Shipped

__all__ = [
    "Checked",
    "Checks",
    "Data",
    "Deploy",
    "Export",
    "Factory",
    "Gate",
    "GateError",
    "History",
    "Job",
    "JobError",
    "Move",
    "Observe",
    "Parity",
    "Release",
    "ReleaseError",
    "RequestError",
    "Retrain",
    "Retrained",
    "ServiceError",
    "SettingsError",
    "ShipError",
    "Shipped",
    "Snapshot",
    "Train",
    "UserError",
    "check",
    "history",
    "live",
    "promote",
    "retrain",
    "rollback",
    "run",
]

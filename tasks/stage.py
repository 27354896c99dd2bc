"""A stage of a run: its Prefect task, and its folder, which is made once and found again when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from torchworker.contract import RESULT, decode
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.run_folder import add_fact
from train_and_ship.tasks.policy import worth_retrying

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
Result = TypeVar("Result", bound="DataclassInstance")

SERVICE_DELAYS = (1.0, 2.0, 5.0, 15.0)
"""Seconds before each further attempt at what needs the bucket, MLflow or another service."""
WORKER_DELAYS = (1.0,)
"""The same for what needs a worker process alone."""


def stage_task(
    name: str, run_name: str = "", delays: Sequence[float] = SERVICE_DELAYS
) -> Callable[[Callable[Arguments, Coroutine[Any, Any, Returned]]], Task[Arguments, Coroutine[Any, Any, Returned]]]:
    """The Prefect task of a stage: nothing is cached, and an attempt follows when the error says that it can help.

    Args:
        name: of the task.
        run_name: of its runs; the task's name when empty.
        delays: seconds before each further attempt; empty when there is one attempt only.
    """
    return task(
        name=name,
        task_run_name=run_name or name,
        cache_policy=NO_CACHE,
        retries=len(delays),
        retry_delay_seconds=list(delays),
        retry_condition_fn=worth_retrying,
    )


async def run_stage(
    stage: StageFolder,
    kind: type[Result],
    make: Callable[[Path], Awaitable[Result]],
    file: str = RESULT,
    *,
    quiet: bool = False,
) -> Result:
    """What is in the folder of a stage, which is made first unless this run has it already.

    Args:
        stage: the folder, and what it is made from.
        kind: class of what comes out.
        make: gets the empty work folder, and asks workers. Whatever it raises leaves the stage incomplete.
        file: where the result is kept. `result.json` is the reply of the worker; any other file is written here.
        quiet: log nothing about a stage that is complete already.
    """
    if not stage.is_complete():
        work = stage.begin()
        made = await make(work)
        if file != RESULT:
            add_fact(work, file, made)
        stage.finish()
    elif not quiet:
        get_run_logger().info("%s: already complete in this run, verified by hash", stage.path.name)
    said = json.loads((stage.path / file).read_text())
    found: Result = decode(kind, said["result"] if file == RESULT else said)
    return found

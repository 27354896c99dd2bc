"""One run of a model at a time, on all machines of a Prefect server."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TextIO

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, concurrency
from prefect.runtime import flow_run

from train_and_ship.infra.home import make_folder
from train_and_ship.infra.private import take_password
from train_and_ship.infra.rundir import require_run_id
from train_and_ship.infra.settings import Settings
from train_and_ship.tasks.at_work import ABOUT_SILENCE, at_work_now, never_silent
from train_and_ship.tasks.away import patiently
from train_and_ship.tasks.bars import bars
from train_and_ship.tasks.extras import require_variables
from train_and_ship.tasks.job_file import read_job_file
from train_and_ship.tasks.naming import tag_run
from train_and_ship.tasks.outcome import report_abandoned
from train_and_ship.tasks.policy import quiet_mistakes
from train_and_ship.tasks.results import JobFile
from train_and_ship.tasks.shipped import require_files
from train_and_ship.tasks.stopping import stoppable

LEASE_SECONDS = 60
"""A run that died with its machine holds those of other machines up no longer than this."""
TRY_SECONDS = 1.0


@contextlib.asynccontextmanager
async def exclusive(job_file: str, resume: str = "") -> AsyncIterator[JobFile]:
    """Read the job file, wait until no other run of its model is at work, and keep others waiting until the end.

    On this machine by a lock that the kernel frees when its holder dies; between machines by a global concurrency limit
    of Prefect, `train-and-ship.<model>`, whose slot is on a lease: a run that cannot renew it, because the server is
    away, goes on all the same. A run that is gone on with does not wait for the slot, which may be its own from before.
    Then what died without a word gets its report. The job is the one that was asked for, also after a long wait. A
    person may stop the run from the beginning on.

    Raises JobError for a job file with mistakes, for variables that it names and that are not set here, for files that
    no release can have, and for a `resume` that is no id of a run.
    """
    quiet_mistakes()
    require_run_id(resume)
    # Before it waits: the code of other jobs may be at work on this machine.
    take_password()
    flow_run_id = str(flow_run.get_id())
    read = read_job_file(job_file, flow_run_id)
    require_variables(read.job)
    await asyncio.to_thread(require_files, read.job, read.project)
    model = read.job.name
    settings = Settings.load()
    waiting = f"another run of {model} is at work; this one waits for its end"
    limit = f"train-and-ship.{model}"
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(limit, 1)
        await tag_run(client, model, read.job.release.channel)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(stoppable())
        lock = stack.enter_context(_lock_file(settings.runs / model))
        if not _locked(lock):
            get_run_logger().warning(waiting)
            # Another process cannot set an event of ours.
            while not _locked(lock):  # noqa: ASYNC110
                await asyncio.sleep(TRY_SECONDS)
        try:
            # Slots are given out in no order: whoever asks first after the release gets it.
            await take_slot(stack, limit, TRY_SECONDS)
        except AcquireConcurrencySlotTimeoutError:
            if not resume and (flow_run.get_run_count() or 1) == 1:
                # A server that has just started may only be slow.
                if await _is_taken(limit):
                    get_run_logger().warning(waiting)
                await take_slot(stack, limit, None)
        await report_abandoned(model, resume or flow_run_id, settings)
        stack.enter_context(bars(at_work_now))
        await stack.enter_async_context(never_silent(partial(get_run_logger().info, extra={ABOUT_SILENCE: True})))
        yield read


async def _is_taken(limit: str) -> bool:
    async def ask() -> bool:
        async with get_client() as client:
            return bool((await client.read_global_concurrency_limit_by_name(limit)).active_slots)

    return await patiently(ask, "this run asks whether another one is at work")


def _lock_file(folder: Path) -> TextIO:
    make_folder(folder)
    return (folder / "run.lock").open("w")


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def take_slot(stack: contextlib.AsyncExitStack, limit: str, seconds: float | None) -> None:
    """Hold the slot until the stack ends. A Prefect that is away while others hold it is asked again."""

    async def take() -> None:
        slot = concurrency(
            limit,
            lease_duration=LEASE_SECONDS,
            timeout_seconds=seconds,
            strict=True,
            raise_on_lease_renewal_failure=False,
        )
        await stack.enter_async_context(slot)

    await patiently(take, "this run waits for its turn")

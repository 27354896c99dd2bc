"""One run of a model at a time, on all machines of a Prefect server."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, concurrency
from prefect.runtime import flow_run

from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.outcome import report_abandoned
from train_and_ship.tasks.policy import quiet_mistakes

LEASE_SECONDS = 60
"""A run that died with its machine holds those of other machines up no longer than this."""
TRY_SECONDS = 1.0


@contextlib.asynccontextmanager
async def exclusive(job_file: str, resume: str = "") -> AsyncIterator[None]:
    """Wait until no other run of this job's model is at work, and keep others waiting until the end.

    On this machine by a lock that the kernel frees when its holder dies; between machines by a global concurrency limit
    of Prefect, `train-and-ship.<model>`, whose slot is on a lease: a run that cannot renew it, because the server is
    away, goes on all the same. A run that is gone on with does not wait for the slot, which may be its own from before.
    Then what died without a word gets its report. Raises JobError for a job file with mistakes.
    """
    quiet_mistakes()
    job, _ = load_job(Path(job_file))
    settings = Settings.load()
    log = get_run_logger()
    waiting = f"another run of {job.name} is at work; this one waits for its end"
    limit = f"train-and-ship.{job.name}"
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(limit, 1)
    async with contextlib.AsyncExitStack() as stack:
        lock = stack.enter_context(_lock_file(settings.runs / job.name))
        if not _locked(lock):
            log.warning(waiting)
            # Another process cannot set an event of ours.
            while not _locked(lock):  # noqa: ASYNC110
                await asyncio.sleep(TRY_SECONDS)
        try:
            # Slots are given out in no order: whoever asks first after the release gets it.
            await stack.enter_async_context(_slot(limit, TRY_SECONDS))
        except AcquireConcurrencySlotTimeoutError:
            if not resume and (flow_run.get_run_count() or 1) == 1:
                log.warning(waiting)
                await stack.enter_async_context(_slot(limit, None))
        await report_abandoned(job.name, resume or str(flow_run.get_id()), settings)
        yield


def _lock_file(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "run.lock").open("w")


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _slot(limit: str, seconds: float | None) -> contextlib.AbstractAsyncContextManager[None]:
    return concurrency(
        limit,
        lease_duration=LEASE_SECONDS,
        timeout_seconds=seconds,
        strict=True,
        raise_on_lease_renewal_failure=False,
    )

"""One run of a model at a time, on all machines of a Prefect server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, concurrency

from registry.job import load_job
from tasks.policy import quiet_mistakes

LEASE_SECONDS = 60
"""A run that died, with its machine perhaps, holds the others up no longer than this."""
TRY_SECONDS = 1.0


@contextlib.asynccontextmanager
async def alone(job_file: str) -> AsyncIterator[None]:
    """Wait until no other run of this job's model is at work, and keep others waiting until the end.

    A global concurrency limit of Prefect, `train-and-ship.<model>`, whose slot is on a lease: a run that cannot renew
    it, because the server is away, goes on all the same. Raises JobError for a job file with mistakes.
    """
    quiet_mistakes()
    job, _ = load_job(Path(job_file))
    limit = f"train-and-ship.{job.name}"
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(limit, 1)
    async with contextlib.AsyncExitStack() as stack:
        try:
            # Slots are given out in no order: whoever asks first after the release gets it.
            await stack.enter_async_context(_slot(limit, TRY_SECONDS))
        except AcquireConcurrencySlotTimeoutError:
            get_run_logger().warning("another run of %s is at work; this one waits for its end", job.name)
            await stack.enter_async_context(_slot(limit, None))
        yield


def _slot(limit: str, seconds: float | None) -> contextlib.AbstractAsyncContextManager[None]:
    return concurrency(
        limit, lease_duration=LEASE_SECONDS, timeout_seconds=seconds, strict=True, raise_on_lease_renewal_failure=False
    )

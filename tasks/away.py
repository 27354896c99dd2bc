"""Prefect that is away for a while, as for an upgrade: which errors say so, and waiting for it.

Its client repeats a request for about a minute, and one that never reached the server not at all. What takes longer is
decided where it happens: a question to a person waits as long as the person may take, a page is left out, and the end
of a run waits for an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

Result = TypeVar("Result")

LOOK_SECONDS = 2.0
END_SECONDS = 3600.0
"""How long the end of a run waits for Prefect, which would show it as running, and then as crashed, otherwise."""


def is_away(error: BaseException | None) -> bool:
    """Whether an error of Prefect's client says that no server answers, or none that is in order, just now."""
    if isinstance(error, ConcurrencySlotAcquisitionError):
        # Whatever kept the client from asking for the slot.
        error = error.__cause__
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, httpx.TransportError)


async def patiently(ask: Callable[[], Awaitable[Result]], what: str, seconds: float = math.inf) -> Result:
    """What Prefect answers; asked again for as long as it is away, which the log says once.

    Args:
        ask: sends the request.
        what: waits for it, for the log: "what became of this run waits for it".
        seconds: after which its last error is raised, as any other error is at once.
    """
    ends, said = time.monotonic() + seconds, False
    while True:
        try:
            return await ask()
        except Exception as error:
            if not is_away(error) or time.monotonic() > ends:
                raise
            if not said:
                get_run_logger().warning("Prefect does not answer; %s: %s", what, error)
                said = True
        await asyncio.sleep(LOOK_SECONDS)


async def until_it_answers() -> None:
    """Return once Prefect answers, or after END_SECONDS; whether it is in order is not asked."""

    async def ask() -> None:
        async with get_client() as client:
            await client.hello()

    # What comes next is tried all the same.
    with contextlib.suppress(Exception):
        await patiently(ask, "what became of this run waits for it", END_SECONDS)

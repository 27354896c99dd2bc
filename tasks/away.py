"""Prefect that is away for a while, as for an upgrade: which errors say so, and waiting for it.

Its client repeats a request for about a minute, and one that never reached the server not at all. What takes longer is
decided where it happens: a question to a person waits as long as the person may take, a page is left out, and the end
of a run waits for an hour.
"""

from __future__ import annotations

import asyncio
import time

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client

LOOK_SECONDS = 2.0
END_SECONDS = 3600.0
"""How long the end of a run waits for Prefect, which would show it as running, and then as crashed, otherwise."""


def is_away(error: BaseException | None) -> bool:
    """Whether an error of Prefect's client says that no server answers, or none that is in order, just now."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, httpx.TransportError)


async def until_it_answers(seconds: float | None = None) -> None:
    """Return once Prefect answers, or after `seconds` (END_SECONDS when None); whether it is in order is not asked."""
    ends = time.monotonic() + (END_SECONDS if seconds is None else seconds)
    said = False
    while True:
        try:
            async with get_client() as client:
                await client.hello()
            return
        except Exception as error:
            if not is_away(error) or time.monotonic() > ends:
                return
            if not said:
                get_run_logger().warning("Prefect does not answer; what became of this run waits for it: %s", error)
                said = True
        await asyncio.sleep(LOOK_SECONDS)

"""Run something to its end from where an event loop may be running already: a notebook has one."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


def to_its_end(work: Coroutine[Any, Any, _T]) -> _T:
    """What `asyncio.run` gives, or raises; in a thread of its own where this one has a loop that runs.

    Ctrl-C, or a notebook's button, cancels it in either; KeyboardInterrupt follows when it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
    result: Future[_T] = Future()

    async def here() -> _T:
        task = asyncio.current_task()
        assert task is not None, "a loop runs it"
        begun.set_result((asyncio.get_running_loop(), task))
        return await work

    def run() -> None:
        try:
            result.set_result(asyncio.run(here()))
        except BaseException as error:
            result.set_exception(error)

    # As daemon: a process that is ended meanwhile does not wait for it.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="ship", daemon=True)
    try:
        thread.start()
        return result.result()
    except KeyboardInterrupt:
        loop, task = begun.result()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise

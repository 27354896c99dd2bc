"""A person stops a run on its page in Prefect, or with `prefect flow-run cancel`, and the run hears it.

Prefect ends the processes of its workers' runs. Nobody ends those of a run that was started with `ship run`, and a
worker may be gone: so each run looks at its own state, every two seconds and once more directly before it moves a
channel. Until then a stop ends it as Ctrl-C does. While the channel moves it has to wait, and is too late afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, TypeVar
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import Abort
from prefect.states import Cancelled, Running

from torchworker import situations
from train_and_ship.infra.errors import ShipError
from train_and_ship.tasks.away import END_SECONDS, patiently, until_it_answers

LOOK_SECONDS = 2.0
STOPPED = f"cancelled in Prefect {situations.STOPPED}"

Result = TypeVar("Result")


class StoppedError(ShipError):
    """A person stopped the run."""


class Stop:
    """What a run knows of its being stopped."""

    def __init__(self, flow_run_id: UUID) -> None:
        self._flow_run_id = flow_run_id
        self.heard = False
        """Somebody stopped it."""
        self.held = asyncio.Lock()
        """Held while something is done that cannot be taken back."""
        self.late = False
        """That has been done, or the flow is at its end: a stop changes nothing any more."""

    async def watch(self, flow: asyncio.Task[Any]) -> None:
        """Cancel the flow's task, as Ctrl-C does, when somebody has stopped the run. Prefect may be away meanwhile."""
        while True:
            # Whatever keeps it from answering, the run goes on.
            with contextlib.suppress(Exception):
                async with get_client() as client:
                    # Prefect tells those who ask.
                    while not await self.asked(client):  # noqa: ASYNC110
                        await asyncio.sleep(LOOK_SECONDS)
                    break
            await asyncio.sleep(LOOK_SECONDS)
        async with self.held:
            if not self.late:
                flow.cancel()

    async def asked(self, client: PrefectClient) -> bool:
        """Whether somebody has stopped the run by now."""
        state = (await client.read_flow_run(self._flow_run_id)).state
        self.heard = self.heard or (state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED))
        return self.heard

    def require_not_heard(self) -> None:
        """Raises StoppedError when somebody has stopped the run, as far as it has heard."""
        if self.heard:
            raise StoppedError(STOPPED)

    async def come_too_late(self) -> None:
        """The flow has an end of its own, which Prefect refuses after a stop: the run would be Cancelling for good.

        Prefect is waited for: its client gives the end up after a minute.
        """
        async with self.held:
            self.late = True
        await until_it_answers()
        with contextlib.suppress(Exception):
            async with get_client() as client:
                if await self.asked(client):
                    get_run_logger().warning("the stop came too late")
                    await client.set_flow_run_state(self._flow_run_id, Running(message="stopped too late"), force=True)

    async def end(self) -> Abort:
        """Set the run to Cancelled, and do what follows: its report, and the record of a retraining. What to raise."""
        context = FlowRunContext.get()
        assert context is not None and context.flow is not None and context.flow_run is not None
        get_run_logger().warning(STOPPED)
        state: State[Any] = Cancelled(message=STOPPED)

        async def say() -> None:
            async with get_client() as client:
                await client.set_flow_run_state(self._flow_run_id, state, force=True)

        await patiently(say, "that this run was stopped waits for it", END_SECONDS)
        for hook in context.flow.on_cancellation_hooks or []:
            done = hook(context.flow, context.flow_run, state)
            if done is not None:
                await done
        stopped = Abort(STOPPED)
        # Prefect's engine takes the run's state from there, and sets none itself.
        stopped.state = state  # type: ignore[attr-defined]
        return stopped


_stop: ContextVar[Stop | None] = ContextVar("stop", default=None)


@contextlib.asynccontextmanager
async def stoppable() -> AsyncIterator[None]:
    """The flow inside ends as Cancelled when a person stops its run; then Prefect's Abort is raised."""
    context = FlowRunContext.get()
    flow = asyncio.current_task()
    assert context is not None and context.flow_run is not None and flow is not None
    stop = Stop(context.flow_run.id)
    token = _stop.set(stop)
    watching = asyncio.create_task(stop.watch(flow))
    try:
        try:
            yield
        except StoppedError:
            raise
        except Exception:
            await stop.come_too_late()
            raise
        await stop.come_too_late()
    except (asyncio.CancelledError, StoppedError) as error:
        if not stop.heard:
            raise
        if isinstance(error, asyncio.CancelledError):
            flow.uncancel()
        watching.cancel()
        raise await stop.end() from None
    finally:
        watching.cancel()
        _stop.reset(token)


def require_not_stopped() -> None:
    """For what moves a channel, in the thread in which it does: raises StoppedError when the run was stopped."""
    if (stop := _stop.get()) is not None:
        stop.require_not_heard()


async def unless_stopped(act: Callable[[], Result]) -> Result:
    """Do in a thread what cannot be taken back, unless somebody has stopped the run until now: StoppedError."""
    stop = _stop.get()
    if stop is None:
        return await asyncio.to_thread(act)
    async with stop.held:
        with contextlib.suppress(Exception):
            async with get_client() as client:
                await stop.asked(client)
        stop.require_not_heard()
        done = await asyncio.to_thread(act)
        stop.late = True
        return done

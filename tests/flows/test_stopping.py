"""What a run does about a stop, by when it comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect import flow
from prefect.exceptions import Abort
from prefect.runtime import flow_run

from tests.support.prefect_api import Api
from train_and_ship.infra.settings import Settings
from train_and_ship.tasks.stopping import STOPPED, require_not_stopped, stoppable, unless_stopped


class Asked:
    """A flow that does something that cannot be taken back, and what became of it."""

    def __init__(self, api: Api) -> None:
        self.api, self.done, self.hooks, self.run = api, [], [], ""

    def stop(self, kind: str = "CANCELLING") -> None:
        """As Prefect's page does."""
        self.api.ask("POST", f"/flow_runs/{self.run}/set_state", {"state": {"type": kind}})

    def end(self, before: Any = None, during: Any = None) -> None:
        """Run the flow. before, during: called before the act, and in it."""

        def hook(flow: Any, flow_run: Any, state: Any) -> None:
            self.hooks.append(state.name)

        def act() -> str:
            if during:
                during()
            require_not_stopped()
            self.done.append("moved")
            return "moved"

        @flow(name="asked", on_cancellation=[hook])
        async def asked() -> str:
            self.run = str(flow_run.get_id())
            async with stoppable():
                if before:
                    await before()
                return await unless_stopped(act)

        asyncio.run(asked())

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.api.ask("GET", f"/flow_runs/{self.run}")["state"]
        return found


@pytest.fixture
def asked(stack: Settings) -> Asked:
    return Asked(Api(stack))


@pytest.mark.parametrize("kind", ["CANCELLING", "CANCELLED"])
def test_a_stop_directly_before_the_move_prevents_it(asked: Asked, kind: str) -> None:
    async def before() -> None:
        asked.stop(kind)

    with pytest.raises(Abort, match=STOPPED):
        asked.end(before)
    assert (asked.done, asked.hooks, asked.state["type"]) == ([], ["Cancelled"], "CANCELLED")
    assert asked.state["message"] == STOPPED


def test_a_stop_is_heard_while_the_flow_waits(asked: Asked) -> None:
    async def before() -> None:
        asked.stop()
        await asyncio.sleep(600)

    with pytest.raises(Abort, match=STOPPED):
        asked.end(before)
    assert (asked.done, asked.hooks, asked.state["type"]) == ([], ["Cancelled"], "CANCELLED")


def test_a_stop_that_comes_while_the_channel_moves_is_too_late_and_the_run_says_what_it_did(asked: Asked) -> None:
    asked.end(during=asked.stop)
    assert (asked.done, asked.hooks, asked.state["type"]) == (["moved"], [], "COMPLETED")


def test_a_run_that_fails_by_itself_when_it_is_stopped_ends_as_failed(asked: Asked) -> None:
    def during() -> None:
        asked.stop()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        asked.end(during=during)
    assert (asked.done, asked.hooks, asked.state["type"]) == ([], [], "FAILED")


def test_a_prefect_that_does_not_answer_stops_nobody(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise OSError("nobody there")

    monkeypatch.setattr("train_and_ship.tasks.stopping.get_client", away)
    asked.end()
    assert (asked.done, asked.state["type"]) == (["moved"], "COMPLETED")


def test_whatever_else_cancels_a_flow_is_no_stop(asked: Asked) -> None:
    async def before() -> None:
        raise asyncio.CancelledError

    with pytest.raises(BaseException) as ended:
        asked.end(before)
    assert not isinstance(ended.value, Abort)
    assert (asked.done, asked.hooks, asked.state["type"]) == ([], [], "CRASHED")

"""Prefect is away for longer than its client repeats a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import Abort, FlowPauseTimeout
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_RETRY_JITTER_FACTOR,
    temporary_settings,
)

from tests.support.ports import free_port
from tests.support.prefect_api import Api
from tests.support.stack_servers import PrefectServer
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.tasks import approval, away
from train_and_ship.tasks.approval import ask_person, requester
from train_and_ship.tasks.exclusive import take_slot
from train_and_ship.tasks.policy import show
from train_and_ship.tasks.results import Answer
from train_and_ship.tasks.stopping import STOPPED, stoppable

YES = {"approve": True, "by": "grace", "comment": ""}


class AskedRun:
    """A flow that asks a person, and what the world does meanwhile, in a thread of its own."""

    def __init__(self, api: Api) -> None:
        self.api, self.run = api, ""

    def end(self, meanwhile: Callable[[], object], before: Callable[[], object] = lambda: None) -> Answer:
        """Run it. before: called in the flow, before it asks."""

        @flow(name="asked")
        async def asked() -> Answer:
            self.run = str(flow_run.get_id())
            async with stoppable():
                before()
                happening = asyncio.create_task(asyncio.to_thread(meanwhile))
                answer = await ask_person("Shall it go live?")
                await happening
                return answer

        return asyncio.run(asked())

    def waits(self) -> None:
        """Until the run is paused, and the form is there."""
        while not self.run:
            time.sleep(0.05)
        keys = self.api.wait(self.run, "Paused")["state"]["state_details"]["run_input_keyset"]
        while True:
            with contextlib.suppress(httpx.HTTPStatusError):
                self.api.ask("GET", f"/flow_runs/{self.run}/input/{keys['description']}")
                return
            time.sleep(0.05)

    def says_yes(self) -> None:
        self.api.answer(self.run, **YES)


class Away:
    """Requests of Prefect's client that nobody answers, as while the server is started anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fails(self, method: str, times: int) -> None:
        asks, left = getattr(PrefectClient, method), [times]

        async def asked(client: PrefectClient, *given: Any, **named: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise httpx.ConnectError("All connection attempts failed")
            return await asks(client, *given, **named)

        self._monkeypatch.setattr(PrefectClient, method, asked)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Away:
    monkeypatch.setattr(approval, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(away, "LOOK_SECONDS", 0.1)
    return Away(monkeypatch)


@pytest.fixture
def asked(stack: Settings) -> AskedRun:
    return AskedRun(Api(stack))


def test_a_question_is_asked_again_until_prefect_answers(asked: AskedRun, gone: Away) -> None:
    def meanwhile() -> None:
        asked.waits()
        gone.fails("read_flow_run", 5)
        asked.says_yes()

    assert asked.end(meanwhile) == Answer(approved=True, said="by someone said to be grace")
    assert asked.api.wait(asked.run, "Completed")


@pytest.mark.parametrize("step", ["set_flow_run_state", "create_flow_run_input"])
def test_a_question_that_did_not_reach_prefect_is_put_again(asked: AskedRun, gone: Away, step: str) -> None:
    def meanwhile() -> None:
        asked.waits()
        asked.says_yes()

    assert asked.end(meanwhile, before=lambda: gone.fails(step, 2)).said == "by someone said to be grace"


def test_who_asks_is_known_of_a_run_that_somebody_started_here(stack: Settings, gone: Away) -> None:
    @flow(name="by hand")
    async def by_hand() -> str:
        gone.fails("read_flow_run", 1)
        return await requester()

    assert asyncio.run(by_hand()) == who()


def test_an_answer_whose_reading_failed_is_taken(asked: AskedRun, gone: Away) -> None:
    gone.fails("read_flow_run_input", 3)

    def meanwhile() -> None:
        asked.waits()
        asked.says_yes()

    assert asked.end(meanwhile).approved


def test_nobody_waits_longer_than_the_time_that_a_person_has(
    asked: AskedRun, gone: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approval, "WAIT_SECONDS", 2)

    def meanwhile() -> None:
        asked.waits()
        gone.fails("read_flow_run", 2)

    with pytest.raises(FlowPauseTimeout):
        asked.end(meanwhile)


def test_a_page_that_prefect_does_not_take_is_left_out(
    stack: Settings, gone: Away, caplog: pytest.LogCaptureFixture
) -> None:
    @flow(name="shown")
    async def shown() -> str:
        gone.fails("create_artifact", 1)
        await show("# Report", "a report", "asked")
        return "went on"

    assert asyncio.run(shown()) == "went on"
    assert "Prefect does not answer and goes without 'a report'" in caplog.text


def test_the_end_of_a_run_waits_for_prefect(stack: Settings, gone: Away, caplog: pytest.LogCaptureFixture) -> None:
    @flow(name="ended")
    async def ended() -> str:
        async with stoppable():
            gone.fails("hello", 3)
        return "done"

    assert asyncio.run(ended()) == "done"
    assert "what became of this run waits for it" in caplog.text


def test_a_run_that_was_stopped_says_so_once_prefect_is_back(stack: Settings, gone: Away) -> None:
    api, runs = Api(stack), list[str]()

    @flow(name="stopped")
    async def stopped() -> None:
        runs.append(str(flow_run.get_id()))
        async with stoppable():
            gone.fails("set_flow_run_state", 2)
            api.ask("POST", f"/flow_runs/{runs[0]}/set_state", {"state": {"type": "CANCELLING"}})
            await asyncio.sleep(600)

    with pytest.raises(Abort, match=STOPPED):
        asyncio.run(stopped())
    assert api.ask("GET", f"/flow_runs/{runs[0]}")["state"]["type"] == "CANCELLED"


def test_a_run_that_waits_for_its_turn_goes_on_waiting(stack: Settings, gone: Away) -> None:
    @flow(name="turn")
    async def turn() -> str:
        async with get_client() as client:
            await client.upsert_global_concurrency_limit_by_name("turn", 1)
        gone.fails("increment_concurrency_slots_with_lease", 1)
        async with contextlib.AsyncExitStack() as held:
            await take_slot(held, "turn", None)
            return "had it"

    assert asyncio.run(turn()) == "had it"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrefectServer]:
    """A Prefect server of this test's own, and a client that gives a request up after two seconds instead of sixty."""
    started = PrefectServer(tmp_path, free_port())
    started.start()
    settings = {
        PREFECT_API_URL: started.api_url,
        PREFECT_CLIENT_MAX_RETRIES: 1,
        PREFECT_CLIENT_RETRY_JITTER_FACTOR: 0,
    }
    try:
        with temporary_settings(settings):
            yield started
    finally:
        started.kill()


@pytest.mark.soak
def test_a_prefect_server_that_is_stopped_while_a_person_is_asked_costs_no_answer(server: PrefectServer) -> None:
    asked = AskedRun(Api(server.api_url))

    def meanwhile() -> None:
        asked.waits()
        server.kill()
        # Longer than the client repeats the request that it was at.
        time.sleep(8)
        server.start()
        asked.says_yes()

    assert asked.end(meanwhile) == Answer(approved=True, said="by someone said to be grace")
    assert asked.api.wait(asked.run, "Completed")


@pytest.mark.soak
def test_an_answer_that_was_given_just_before_the_server_stopped_is_taken(server: PrefectServer) -> None:
    asked = AskedRun(Api(server.api_url))

    def meanwhile() -> None:
        asked.waits()
        asked.says_yes()
        server.kill()
        time.sleep(8)
        server.start()

    assert asked.end(meanwhile).approved

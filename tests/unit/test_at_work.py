"""A run whose log is silent says what is at work."""

from __future__ import annotations

import asyncio
import logging

import pytest

from train_and_ship.tasks import at_work
from train_and_ship.tasks.at_work import WAITS, never_silent, now_at

LOG = logging.getLogger("prefect.task_runs.test")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(at_work, "EARLY_SECONDS", 0.04)


def said_while(stage: str, seconds: float, *, line_every: float = 10.0, parts: tuple[str, ...] = ()) -> list[str]:
    said: list[str] = []

    async def run() -> None:
        async with never_silent(said.append):
            with at_work.at_work(stage):
                now_at(stage, parts)
                for _ in range(round(seconds / min(line_every, seconds))):
                    await asyncio.sleep(min(line_every, seconds))
                    LOG.warning("a line")
            await asyncio.sleep(0.06)

    asyncio.run(run())
    return said


def test_what_is_at_work_is_said_while_nothing_else_is() -> None:
    said = said_while("export", 0.1, parts=("onnx", "pt2"))
    assert said and set(said) == {"export is at work: onnx, pt2, 0 s so far"}
    assert len(said) <= 2


def test_nothing_is_said_between_other_lines_nor_when_no_stage_is_at_work() -> None:
    assert said_while("train", 0.1, line_every=0.01) == []


def test_a_stage_that_waits_for_a_person_does_not_repeat_it() -> None:
    assert said_while(WAITS, 0.1) == []


def test_after_its_first_minute_a_stage_is_named_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "MINUTE", 0.0)
    assert said_while("export", 0.1) == []

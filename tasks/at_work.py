"""What a run is at, said where nothing else has been for a while: nobody watches a silent terminal. No Prefect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field

EARLY_SECONDS, LATE_SECONDS = 4.0, 30.0
"""Of silence, after which it is said what is at work: in the first minute of a stage, and later."""
MINUTE = 60.0
LOOK_SECONDS = 0.5
WAITS = "wait for approval"
"""A stage that says itself what it waits for, for days perhaps."""
ABOUT_SILENCE = "about_silence"
"""Mark of a log record that says what the bars show: it goes to logs, and not to a terminal that has them."""
_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")


@dataclass(frozen=True, kw_only=True)
class AtWork:
    """A stage that is at work."""

    name: str
    seconds: float
    """Since it began."""
    said: str = ""
    """What it is at."""
    done: float | None = None
    """Share of it, 0 to 1; None where nobody knows."""


@dataclass
class _Stage:
    began: float
    parts: list[str] = field(default_factory=list)
    done: float | None = None


_stages: dict[str, _Stage] = {}


@contextlib.contextmanager
def at_work(stage: str) -> Iterator[None]:
    """The stage is at work in this block."""
    _stages[stage] = _Stage(time.monotonic())
    try:
        yield
    finally:
        _stages.pop(stage, None)


def now_at(stage: str, parts: Collection[str], done: float | None = None) -> None:
    """Name what the stage is at.

    Args:
        stage: which.
        parts: such as the formats that are not ready; none for the stage as a whole.
        done: share of the stage, or of what is named, 0 to 1; None where nobody knows.
    """
    if stage in _stages:
        _stages[stage].parts, _stages[stage].done = list(parts), done


def at_work_now() -> list[AtWork]:
    """The stages that are at work, but for those that wait for a person."""
    now = time.monotonic()
    return [
        AtWork(name=name, seconds=now - stage.began, said=", ".join(stage.parts), done=stage.done)
        for name, stage in [*_stages.items()]
        if name != WAITS
    ]


@contextlib.asynccontextmanager
async def never_silent(say: Callable[[str], None]) -> AsyncIterator[None]:
    """Around a flow: whenever its log was silent, `say` is called with what has been at work for how long."""
    heard = _Heard()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(heard)
    speaker = asyncio.create_task(_speak(heard, say))
    try:
        yield
    finally:
        speaker.cancel()
        for logger in loggers:
            logger.removeHandler(heard)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.last = time.monotonic()


async def _speak(heard: _Heard, say: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = time.monotonic()
        stages = {name: stage for name, stage in _stages.items() if name != WAITS}
        if not stages:
            continue
        young = any(now - stage.began < MINUTE for stage in stages.values())
        if now - heard.last >= (EARLY_SECONDS if young else LATE_SECONDS):
            say("; ".join(_line(name, stage, now) for name, stage in stages.items()))
            heard.last = now


def _line(name: str, stage: _Stage, now: float) -> str:
    parts = f": {', '.join(stage.parts)}" if stage.parts else ""
    share = f", {stage.done:.0%}" if stage.done is not None else ""
    return f"{name} is at work{parts}{share}, {now - stage.began:.0f} s so far"

"""On a terminal a run draws bars below its log; a log has plain lines."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.theme import Theme

from train_and_ship.tasks import at_work
from train_and_ship.tasks import bars as bars_of_a_run
from train_and_ship.tasks.at_work import ABOUT_SILENCE, WAITS, AtWork, at_work_now, never_silent, now_at
from train_and_ship.tasks.bars import bars, drawn


class Handler(logging.Handler):
    """As Prefect's: prints by a console of rich."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.console = Console(
            file=io.StringIO(), force_terminal=terminal, width=80, color_system=None, theme=Theme(inherit=False)
        )

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record))


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(at_work, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(at_work, "EARLY_SECONDS", 0.02)
    monkeypatch.setattr(bars_of_a_run, "FROM_SECONDS", 0.0)
    monkeypatch.setattr(bars_of_a_run, "A_SECOND", 50)
    yield logger


def shown(logger: logging.Logger, *, terminal: bool) -> str:
    logger.addHandler(handler := Handler(terminal))
    log = logging.getLogger("prefect.task_runs.test")

    async def run() -> None:
        with bars(at_work_now):
            async with never_silent(lambda line: log.warning(line, extra={ABOUT_SILENCE: True})):
                with at_work.at_work("train"), at_work.at_work(WAITS):
                    now_at("train", ["epoch 1/4"], 0.25)
                    log.warning("a line of the log")
                    await asyncio.sleep(0.1)

    asyncio.run(run())
    assert handler.filters == []
    text: str = handler.console.file.getvalue()
    return text


def test_a_terminal_has_a_bar_with_what_the_stage_is_at_and_no_line_about_silence(logger: logging.Logger) -> None:
    text = shown(logger, terminal=True)
    assert "train" in text and "━" in text and "epoch 1/4" in text and "a line of the log" in text
    assert "is at work" not in text and WAITS not in text


def test_a_log_has_plain_lines(logger: logging.Logger) -> None:
    lines = set(shown(logger, terminal=False).splitlines())
    assert lines == {"a line of the log", "train is at work: epoch 1/4, 25%, 0 s so far"}


def test_a_bar_has_the_share_that_is_done_and_words_of_others_steer_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=90, color_system=None, legacy_windows=False)
    long = AtWork(name="rehearse", seconds=7.0, said="resampling\x1b[2J f1", done=0.5)
    console.print(drawn([long, AtWork(name="export", seconds=0.1)]))
    (line,) = console.file.getvalue().splitlines()
    assert re.fullmatch(r"rehearse  ━{12} +7 s  resampling\\x1b\[2J f1 *", line), line

"""Bars on a terminal for what a run is at, below the lines of its log; nothing where nobody looks. No Prefect."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train_and_ship.infra.shown import on_one_line
from train_and_ship.tasks.at_work import ABOUT_SILENCE, AtWork

FROM_SECONDS = 0.5
"""What is over sooner flickers."""
A_SECOND = 4
"""Times that they are drawn."""


@contextlib.contextmanager
def bars(look: Callable[[], Sequence[AtWork]]) -> Iterator[None]:
    """Draw them while the block runs, where Prefect's log goes to a terminal. look: what is at work now."""
    handler, console = _terminal()
    if handler is None or console is None:
        yield
        return
    handler.addFilter(_not_about_silence)
    try:
        # By the console of the log: its lines go above.
        live = Live(console=console, get_renderable=lambda: drawn(look()), refresh_per_second=A_SECOND, transient=True)
        with live:
            yield
    finally:
        handler.removeFilter(_not_about_silence)


def drawn(found: Sequence[AtWork]) -> Table:
    """A line each: name, bar, seconds so far, what it is at."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, min_width=8)
    table.add_column(width=24)
    table.add_column(no_wrap=True, justify="right", min_width=5)
    # What does not fit is cut here.
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for bar in found:
        if bar.seconds >= FROM_SECONDS:
            share = min(1.0, max(0.0, bar.done)) if bar.done is not None else None
            # Named styles: the console of Prefect's log knows none of rich's own.
            line = ProgressBar(
                total=1.0, completed=share or 0.0, pulse=share is None, animation_time=time.monotonic(),
                style="bright_black", complete_style="cyan", finished_style="green", pulse_style="cyan",
            )  # fmt: skip
            table.add_row(Text(bar.name), line, Text(f"{bar.seconds:.0f} s"), Text(on_one_line(bar.said)))
    return table


def _terminal() -> tuple[logging.Handler | None, Console | None]:
    """Where Prefect's log goes, if that is a terminal."""
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", None)
        if isinstance(console, Console) and console.is_terminal and not console.is_jupyter:
            return handler, console
    return None, None


def _not_about_silence(record: logging.LogRecord) -> bool:
    return not getattr(record, ABOUT_SILENCE, False)

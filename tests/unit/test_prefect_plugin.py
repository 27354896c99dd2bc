"""What the prefect command says more, where this is installed and its plugins are on."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.cli import flow_runs_watching
from rich.console import Console

from train_and_ship.ship.prefect_plugin import _end_with_the_headline


@pytest.mark.parametrize("message", ["digits: release [b] stays live on prod", "", None])
def test_watching_a_run_ends_with_what_became_of_it(monkeypatch: pytest.MonkeyPatch, message: str | None) -> None:
    ended: Any = SimpleNamespace(state=SimpleNamespace(message=message))

    async def watch(flow_run_id: Any, console: Any, **_: Any) -> Any:
        console.print("events")
        return ended

    monkeypatch.setattr(flow_runs_watching, "watch_flow_run", watch)
    _end_with_the_headline()
    _end_with_the_headline()
    console = Console(file=io.StringIO(), width=20)
    # As the commands call it.
    assert asyncio.run(flow_runs_watching.watch_flow_run("id", console, timeout=None)) is ended
    assert console.file.getvalue() == ("events\n" + (f"\n{message}\n" if message else ""))

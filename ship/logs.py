"""`ship logs`: what a run has said, as Prefect keeps it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import typer

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import harmless
from train_and_ship.ship.newest_run import run_of

PAGE = 200
"""Lines of one answer: as many as Prefect gives."""
PAUSE_SECONDS = 2.0
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def logs(model: str, run: str, follow: bool) -> None:
    """Print every line with its time and level; with `follow`, until the run has ended.

    Args:
        model: whose run.
        run: id of its flow run; empty for the newest on this machine.
        follow: whether to go on.

    Raises:
        RequestError: there is no such run here.
        ServiceError: Prefect does not answer, or does not know the run any more.
    """
    settings = Settings.load()
    folder = run_of(settings, model, run)
    shown = 0
    while True:
        # Asked first: what is said until its end is then among the lines.
        state = _state(settings, folder.name)
        for line in _lines(settings, folder.name, shown):
            typer.echo(_text(line))
            shown += 1
        if not follow or state in ENDED:
            break
        time.sleep(PAUSE_SECONDS)
    typer.echo(f"{model} {folder.name}: {state.lower()}; what its stages said is in {folder}", err=True)


def _state(settings: Settings, run: str) -> str:
    reply = prefect_api(settings, "GET", f"/flow_runs/{run}")
    if reply.is_success:
        return str(reply.json()["state_type"])
    raise ServiceError(f"Prefect: expected run {run} at {settings.prefect_api_url}, got status {reply.status_code}")


def _lines(settings: Settings, run: str, start: int) -> Iterator[dict[str, Any]]:
    while True:
        query = {
            "logs": {"flow_run_id": {"any_": [run]}},
            "sort": "TIMESTAMP_ASC",
            "limit": PAGE,
            "offset": start,
        }
        reply = prefect_api(settings, "POST", "/logs/filter", query)
        if not reply.is_success:
            raise ServiceError(f"Prefect: expected the log of {run}, got status {reply.status_code}")
        found = reply.json()
        yield from found
        start += len(found)
        if len(found) < PAGE:
            return


def _text(line: dict[str, Any]) -> str:
    when = datetime.fromisoformat(line["timestamp"]).astimezone()
    # A message of several lines, such as a table, stays one; control characters do not reach the terminal.
    message = "\n".join(map(harmless, str(line["message"]).splitlines()))
    return f"{when:%H:%M:%S} {logging.getLevelName(line['level']):<8} {message}"

"""Prefect policy shared by the stages: what is retried, and how an error is logged."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from prefect import Task, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import Abort, TerminationSignal
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, get_current_settings, temporary_settings

from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.text import escaped
from train_and_ship.tasks.away import is_away

__all__ = ["Abort", "TerminationSignal", "quiet_mistakes", "worth_retrying"]

_FLOWS, _TASKS = "prefect.flow_runs", "prefect.task_runs"
_SERVICES = "prefect._internal.concurrency"
"""Threads of Prefect's client."""


def worth_retrying(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the error that ended the attempt says that a retry can help. Anything unforeseen is not retried."""
    return isinstance(state.data, ShipError) and state.data.retryable


_STRAY = re.compile(
    r"Finished in state Completed\(\)"
    # The address has been printed before, by Prefect's engine.
    r"|View at \S+"
    r"|Running hook '\w+' in response to entering state '\w+'|Hook '\w+' finished running successfully"
)
"""What Prefect says of its own accord and nobody asked."""
_TASK_FAILED = "Finished in state Failed("


class _QuietMistakes(logging.Filter):
    """An error raised on purpose is logged as its message; only unforeseen ones show a traceback.

    A stage that failed is named, and the flow says why. What Prefect says of stages that ended well is left out.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(record.msg, str) and _STRAY.fullmatch(record.msg):
            return False
        if record.name == _SERVICES and "ConcurrencySlotAcquisition" in record.getMessage():
            # Whoever asked for the slot is told, and asks again.
            return False
        if record.name == _TASKS and str(record.msg).startswith(_TASK_FAILED):
            record.msg = "failed"
        if isinstance(error, ShipError):
            record.exc_info = None
            record.exc_text = None
            record.msg, record.args = str(error), ()
        return True


def quiet_mistakes() -> None:
    """Install the filter on Prefect's loggers; calling it again changes nothing."""
    for name in (_FLOWS, _TASKS, _SERVICES):
        logger = logging.getLogger(name)
        if not any(isinstance(present, _QuietMistakes) for present in logger.filters):
            logger.addFilter(_QuietMistakes())


@contextlib.contextmanager
def prefect_of(settings: Settings) -> Iterator[None]:
    """Meanwhile Prefect is the one of these settings, also where it was imported before and had read others."""
    if get_current_settings().api.url == settings.prefect_api_url:
        yield
        return
    updates = {PREFECT_API_URL: settings.prefect_api_url, PREFECT_API_AUTH_STRING: settings.prefect_account or None}
    with temporary_settings(updates):
        yield


def artifact_key(kind: str, model: str) -> str:
    """Prefect artifact keys hold letters, digits and dashes. model: empty when nobody knows."""
    return "-".join([kind, model.replace("_", "-").replace(".", "-")]) if model else kind


async def show(text: str, title: str, model: str, kind: str = "report") -> None:
    """Put markdown on the page of this flow run. A Prefect that is away goes without it, which the log says.

    Args:
        text: the markdown.
        title: what the list of artifacts says of it, as plain text.
        model: whose it is.
        kind: what it is, in a word, which is part of the artifact's key.
    """
    try:
        # The list of artifacts shows the description as markdown.
        await acreate_markdown_artifact(text, key=artifact_key(kind, model), description=escaped(title))
    except Exception as error:
        if not is_away(error):
            raise
        get_run_logger().warning("Prefect does not answer and goes without %r: %s", title, error)

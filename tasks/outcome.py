"""Flow hook: a run that fails, crashes or is cancelled says so in MLflow too."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from infra.errors import ShipError
from infra.settings import Settings
from registry.job import load_job
from registry.live_run import live_run

REASON_LENGTH = 1000


async def end_mlflow_run(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Set the MLflow run of the flow run to FAILED or KILLED, with the reason. Never makes anything worse."""
    run = origin(flow_run)
    status = "FAILED" if state.is_failed() else "KILLED"
    reason = _reason(state)
    try:
        if (live := live_run(run)) is not None:
            await asyncio.to_thread(live.end, status, reason)
        elif not state.is_failed():
            # A flow that failed runs this in its own process: without a live run there, none was begun.
            await _end_from_outside(flow_run.parameters["job"], run, status, reason)
    except (ShipError, OSError) as error:
        # The next run of this model on this machine ends it.
        logging.getLogger(__name__).warning("the MLflow run could not be ended: %s", error)


def _reason(state: State[Any]) -> str:
    if isinstance(state.data, Exception):
        text = str(state.data) or type(state.data).__name__
    else:
        text = state.message or str(state.name)
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + " …"


def origin(flow_run: FlowRun) -> str:
    """Id of the flow run that began the run: with `resume` another one."""
    return str(flow_run.parameters.get("resume") or flow_run.id)


async def _end_from_outside(job_file: str, run: str, status: str, reason: str) -> None:
    """The flow's process is gone and a Prefect worker runs this hook: it must not carry mlflow from now on."""
    job, _ = load_job(Path(job_file))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "registry.mlflow_runs"),
        *(job.name, run, status, reason, Settings.load().mlflow_url),
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.wait()

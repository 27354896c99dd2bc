"""Flow hooks: a run that fails, crashes or is cancelled says so in MLflow, and a night in the record of decisions."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from infra.errors import ShipError
from infra.objectstore import ObjectStore
from infra.provenance import who
from infra.settings import Settings
from registry.decisions import FAILED, Decision, record_decision
from registry.job import load_job
from registry.live_run import live_run
from registry.pointer import read_pointer

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


async def record_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Record that a night ended without a candidate, or with one that no gate lets through. Never makes it worse."""
    try:
        await asyncio.to_thread(_record_failure, flow_run, _reason(state))
    except (ShipError, OSError) as error:
        logging.getLogger(__name__).warning("the failed night could not be recorded: %s", error)


def _record_failure(flow_run: FlowRun, reason: str) -> None:
    job, _ = load_job(Path(flow_run.parameters["job"]))
    store = ObjectStore.from_settings(Settings.load())
    live = read_pointer(store, job.name, job.release.channel)
    why = str(flow_run.parameters.get("why", ""))
    decision = Decision(
        model=job.name,
        channel=job.release.channel,
        decision=FAILED,
        why=reason,
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        flow_run=str(flow_run.id),
        asked=f"{why} ({who()})" if why else who(),
        live=live.release if live else "",
    )
    record_decision(store, decision)


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

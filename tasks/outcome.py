"""A run that fails, crashes or is cancelled has its report, and MLflow and the decisions know of it.

Flow hooks see to it, and after a run that died without a word the next one of its model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import GateError, ServiceError, ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import asked_by
from train_and_ship.infra.rundir import is_run_id
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import put_report
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import FAILED, Decision, keep_until_recorded, record_decision
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.tracking.live_run import live_run
from train_and_ship.registry.tracking.runs import REPORT
from train_and_ship.tasks.job_file import find_run, job_of
from train_and_ship.tasks.ledgers import close_ledger
from train_and_ship.tasks.publish import show_in_prefect, write_report
from train_and_ship.tasks.results import flow_run_place

_log = logging.getLogger(__name__)
REASON_LENGTH = 1000
CUT_OFF = "the run was killed, or its machine stopped, before it came to an answer, and nobody went on with it"


async def end_mlflow_run(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Set the MLflow run of the flow run to FAILED or KILLED, with the reason. Never makes anything worse."""
    status, reason = _ended(state)
    try:
        settings = Settings.load()
        model, folder = _folder_of(flow_run, settings)
        if (live := live_run(origin(flow_run))) is not None:
            await asyncio.to_thread(live.end, status, reason, _report_in(folder))
        elif folder is not None and not state.is_failed():
            # A flow that failed runs this in its own process: without a live run there, none was begun.
            await _end_from_outside(model, folder, status, reason, settings)
    except (ShipError, OSError) as error:
        # The next run of this model on this machine ends it.
        _log.warning("the MLflow run could not be ended: %s", error)


async def report_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write the report of a run that did not come to its end: what stopped it, and what is known until there.

    In Prefect and in the run's folder, from where `end_mlflow_run` takes it to MLflow; beside the release when there is
    one in the bucket. Never makes anything worse.
    """
    try:
        settings = Settings.load()
        model, folder = _folder_of(flow_run, settings)
        if folder is not None:
            close_ledger(folder)
        await _report(flow_run, state, model, folder, settings)
    except Exception as error:
        # A hook that raises would hide why the run failed.
        _warn_of_report(error)


async def report_abandoned(model: str, own: str, settings: Settings) -> None:
    """What the hooks would have done for each run of a model on this machine that died without a word.

    own: id of the run that asks, which has to know that no other is at work. Never makes anything worse.
    """
    silent: dict[UUID, Path] = {}
    for path in (settings.runs / model).glob("*-*"):
        # Whatever else somebody keeps there is no run.
        with contextlib.suppress(ValueError):
            if path.name != own and path.is_dir() and not (path / REPORT).exists():
                silent[UUID(path.name)] = path
    if not silent:
        return
    try:
        async with get_client() as client:
            found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(silent))))
    except Exception as error:
        _warn_of_report(error)
        return
    for flow_run in found:
        # Prefect may not have noticed that it died.
        known = flow_run.state if flow_run.state and flow_run.state.is_final() else Crashed(message=CUT_OFF)
        if known.is_completed():
            continue
        folder = silent[flow_run.id]
        # One that cannot be reported keeps neither its own end nor that of another from being told.
        for told in (_report(flow_run, known, model, folder, settings), _end(model, folder, known, settings)):
            try:
                await told
            except Exception as error:
                _warn_of_report(error)


async def _end(model: str, folder: Path, state: State[Any], settings: Settings) -> None:
    await _end_from_outside(model, folder, *_ended(state), settings)


async def _report(flow_run: FlowRun, state: State[Any], model: str, folder: Path | None, settings: Settings) -> None:
    meanwhile = await asyncio.to_thread(_meanwhile, flow_run, state, model, folder, settings)
    outcome = replace(_outcome(flow_run, state, model, settings), meanwhile=meanwhile)
    written = await asyncio.to_thread(write_report, outcome, folder, settings)
    await show_in_prefect(written, model, flow_run.id)
    if written.files is not None and written.files.against is not None:
        store, release = ObjectStore.from_settings(settings), written.files.release
        await asyncio.to_thread(put_report, store, model, release, str(flow_run.id), written.html)


def _warn_of_report(error: Exception) -> None:
    _log.warning("the report of a run could not be written: %s: %s", type(error).__name__, error)


def _folder_of(flow_run: FlowRun, settings: Settings) -> tuple[str, Path | None]:
    """The model and the run's folder; an empty name and None for a job file that nobody can read.

    Moves of channels have a model and no folder.
    """
    if "job" not in flow_run.parameters:
        return str(flow_run.parameters.get("model", "")), None
    run = find_run(str(flow_run.parameters["job"]), str(flow_run.id), origin(flow_run), settings.runs)
    return run or ("", None)


def _report_in(folder: Path | None) -> Path | None:
    return folder / REPORT if folder is not None and (folder / REPORT).is_file() else None


def _outcome(flow_run: FlowRun, state: State[Any], model: str, settings: Settings) -> Outcome:
    error = _error(state)
    if isinstance(error, GateError):
        verdict, why, rest = Ending.REFUSED, error.message, error.table
    else:
        verdict = Ending.FAILED if state.is_failed() else Ending.CRASHED if state.is_crashed() else Ending.CANCELLED
        why, _, rest = _said(state).partition("\n")
    name = model or str(flow_run.parameters.get("job", flow_run.name))
    asked = flow_run.parameters.get("why")
    return Outcome(
        verdict=verdict,
        title=f"{name}: {verdict}",
        why=why,
        table=rest.strip("\n"),
        facts=[("asked by", str(asked))] if asked else [],
        places=[flow_run_place(settings, str(flow_run.name), str(flow_run.id))],
    )


def _meanwhile(
    flow_run: FlowRun, state: State[Any], model: str, folder: Path | None, settings: Settings
) -> list[tuple[str, str]]:
    """What is live while this run did not come to its end, and what can be done; nothing where nobody knows."""
    rows: list[tuple[str, str]] = []
    if not model:
        return rows
    with contextlib.suppress(ShipError, OSError):
        job = str(flow_run.parameters.get("job", ""))
        channel = str(flow_run.parameters.get("channel", ""))
        name = channel or job_of(job, str(flow_run.id), folder).release.channel
        live = read_pointer(Channel(ObjectStore.from_settings(settings), model, name))
        said = f"{name}: release {live.release}, since {live.moved_at[:16].replace('T', ' ')} UTC" if live else ""
        rows.append(("live meanwhile", said or f"{name}: nothing"))
        if isinstance(_error(state), GateError) and job:
            what = "train better, or change the gate in the job, and run again" + (
                "; nothing has to be undone" if live else ""
            )
            rows.append(("what to do", what))
    return rows


async def record_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Record that a retraining run ended without a candidate, or with one that the gates refused. Never raises."""
    try:
        await asyncio.to_thread(_record_failure, flow_run, _reason(state))
    except (ShipError, OSError) as error:
        _log.warning("the failed retraining run could not be recorded: %s", error)


def _record_failure(flow_run: FlowRun, reason: str) -> None:
    settings = Settings.load()
    _, known = _folder_of(flow_run, settings)
    job = job_of(str(flow_run.parameters["job"]), str(flow_run.id), known)
    decision = Decision(
        model=job.name,
        channel=job.release.channel,
        decision=FAILED,
        why=reason,
        flow_run=str(flow_run.id),
        asked=asked_by(str(flow_run.parameters.get("why", ""))),
    )
    folder = settings.runs / job.name / origin(flow_run)
    try:
        store = ObjectStore.from_settings(settings)
        live = read_pointer(Channel(store, job.name, job.release.channel))
        decision = replace(decision, live=live.release if live else "")
        record_decision(store, decision, folder)
    except ServiceError:
        # It may have failed because the bucket is away. The next run of this model on this machine records it.
        keep_until_recorded(folder, decision)
        raise


def _error(state: State[Any]) -> Exception | None:
    """What ended the flow, where this process knows: Prefect wraps it in the record of a result."""
    found = getattr(state.data, "result", state.data)
    return found if isinstance(found, Exception) else None


def _said(state: State[Any]) -> str:
    error = _error(state)
    said = (str(error) or type(error).__name__) if error is not None else (state.message or str(state.name))
    return without_password(said)


def _ended(state: State[Any]) -> tuple[str, str]:
    """As MLflow calls it, and the reason."""
    return "FAILED" if state.is_failed() else "KILLED", _reason(state)


def _reason(state: State[Any]) -> str:
    text = _said(state)
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + " …"


def origin(flow_run: FlowRun) -> str:
    """Id of the flow run that began the run: with `resume` another one, where that is an id and nobody's path."""
    resume = str(flow_run.parameters.get("resume") or "")
    return resume if is_run_id(resume) else str(flow_run.id)


async def _end_from_outside(model: str, folder: Path, status: str, reason: str, settings: Settings) -> None:
    """The flow's process is gone, and whoever does this must not carry mlflow from now on."""
    report = _report_in(folder)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "train_and_ship.registry.tracking.end_run"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    # Everybody on a machine sees command lines.
    asked = [model, folder.name, status, reason, settings.mlflow_url, str(report) if report is not None else ""]
    await process.communicate(json.dumps(asked).encode())

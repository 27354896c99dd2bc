"""Runs in MLflow: one for a flow run, there from the start of training until its end is known.

A run is found again by its tag `flow_run_id`, so whoever comes later (the register stage, a retry, the clean-up
after a death) continues or ends the one that is there.

Points of a curve are sent in order, so what MLflow has of a curve is its beginning, and the step of its last
point says where to go on. Sending a point twice changes nothing: MLflow keeps one of equal points.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from train_and_ship.infra.errors import SettingsError
from train_and_ship.registry.text import fenced, shorten
from train_and_ship.registry.tracking.connection import (
    EXISTS,
    connect,
    key,
    milliseconds,
    passing_over,
    translated,
    user,
)
from train_and_ship.registry.tracking.curves import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

TAG_FLOW_RUN = "flow_run_id"
TAG_COMMIT = "git_commit"
TAG_HASHES = "sha256"
"""Of a version: JSON, file to SHA-256."""
TAG_FAILURE = "failure"
"""Why a run or what came after it failed."""
TAG_PROCESS = "process"
"""`<host> <pid> <start>` of the process that watches over the run."""

REPORT = "report.html"
"""The run's artifact that tells all about it."""
VIEW = "?workflowType=machine_learning"
"""At the end of addresses: MLflow's pages for training; to a new visitor it shows those for prompts and traces."""
BATCH_OF_METRICS = 1000
BATCH_OF_PARAMS = 100
TAG_LENGTH = 5000
_PARAM_LENGTH = 6000

SYSTEM_SECONDS = 5.0
"""Between two measurements of the machine, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of a run when it begins."""

    model: str
    """Name of the registered model, and of the experiment that holds its runs."""
    run_name: str
    params: Mapping[str, str | int | float | bool]
    tags: Mapping[str, str]
    """`flow_run_id`, `git_commit` and whatever else is worth searching for."""
    description: str
    """Markdown on the run's page; the first line is plain text."""
    started: float | None = None
    """When the work began, unix seconds."""

    @property
    def began(self) -> float:
        """`started`, or now where nobody said."""
        return time.time() if self.started is None else self.started


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that can be written to."""

    run_id: str
    experiment_id: str
    latest: Mapping[str, int]
    """Step of the last point of every curve that MLflow has."""
    finished: bool
    """Whether its end is known already: it stays as it is, and points can still be added."""


def page_of_report(run_url: str) -> str:
    """Where people read the REPORT of a run; empty without an address. run_url: of its page, with VIEW or without."""
    page = run_url.removesuffix(VIEW)
    return f"{page}/artifacts/{REPORT}{VIEW}" if page else ""


def open_run(record: RunRecord, tracking_uri: str) -> OpenRun:
    """The run of the record's flow run, continued or new; it is RUNNING unless it had FINISHED. Writes to MLflow.

    A flow run whose params have changed since (an edited job file) begins another run: MLflow keeps params for good.

    Raises ServiceError and SettingsError.
    """
    with translated(f"opening a run of {record.model}", tracking_uri):
        return open_with(connect(tracking_uri), record)


def open_with(client: MlflowClient, record: RunRecord) -> OpenRun:
    """`open_run` with a client, for callers that translate errors themselves."""
    experiment_id = _experiment(client, record.model)
    params = params_of(record.params)
    found = _runs_of(client, experiment_id, record.tags.get(TAG_FLOW_RUN))
    run = next((run for run in found if not _differ(run.data.params, params)), None)
    if run is None:
        run = client.create_run(
            experiment_id,
            start_time=milliseconds(record.began),
            tags=run_tags(record.tags, record.description) | {TAG_PROCESS: _this_process()},
            run_name=record.run_name,
        )
    elif run.info.status != "FINISHED":
        _continue(client, run, record.description)
    if run.data.params.keys() != params.keys():
        _log_params(client, run.info.run_id, params)
    return OpenRun(
        run_id=str(run.info.run_id),
        experiment_id=experiment_id,
        latest={metric.key: int(metric.step) for metric in run.data._metric_objs},
        finished=run.info.status == "FINISHED",
    )


def missing_points(points: Sequence[Point], latest: Mapping[str, int]) -> list[Point]:
    """Those that lie beyond what MLflow has of their curves."""
    return [point for point in points if point.step > latest.get(key(point.key), -1)]


def log_points(run_id: str, points: Sequence[Point], tracking_uri: str) -> None:
    """Add points to the curves of a run. Writes to MLflow. Raises ServiceError and SettingsError."""
    with translated("logging metrics", tracking_uri):
        client = connect(tracking_uri)
        metrics = metrics_of(points)
        for start in range(0, len(metrics), BATCH_OF_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + BATCH_OF_METRICS])


def end_run(
    model: str, flow_run_id: str, status: str, reason: str, tracking_uri: str, report: Path | None = None
) -> None:
    """The flow run failed or was cancelled: say so on its run, which ends unless it has. Writes to MLflow.

    A run that had FINISHED stays so, with the reason: its version exists, and what failed came later. Without a run
    there is nothing to do.

    Args:
        model: name of the experiment.
        flow_run_id: id of the flow run that began it.
        status: `FAILED` or `KILLED`.
        reason: in words.
        tracking_uri: MLflow's.
        report: an HTML file, which becomes the run's REPORT; None when there is none.

    Raises:
        SettingsError: MLflow denies access.
        ServiceError: MLflow does not answer.
    """
    with translated(f"ending the run of {model}", tracking_uri):
        client = connect(tracking_uri)
        experiment = client.get_experiment_by_name(model)
        if experiment is not None:
            for run in _runs_of(client, experiment.experiment_id, flow_run_id)[:1]:
                end_with(client, run.info.run_id, run.info.status, status, reason)
                if report is not None:
                    client.log_text(run.info.run_id, report.read_text(), REPORT)


def end_with(client: MlflowClient, run_id: str, now: str, status: str, reason: str) -> None:
    """`end_run` with a client.

    Args:
        client: MLflow's.
        run_id: MLflow's id of the run.
        now: status that the run has.
        status: `FAILED` or `KILLED`.
        reason: in words.
    """
    from mlflow.entities import RunTag

    tags = {TAG_FAILURE: reason}
    if now != "FINISHED":
        tags["mlflow.note.content"] = note_of_end(status, reason)
    client.log_batch(run_id, tags=[RunTag(name, shorten(value, TAG_LENGTH)) for name, value in tags.items()])
    if now not in ("FINISHED", status):
        client.set_terminated(run_id, status)


def note_of_end(status: str, reason: str) -> str:
    """What the page of a run says of its end, as markdown. Arguments: as of `end_run`."""
    # Cut before, not within, the fences.
    return f"**{status.capitalize()}**\n\n{fenced(shorten(reason, TAG_LENGTH // 2))}"


def end_abandoned(experiment_id: str, tracking_uri: str) -> int:
    """End the runs whose process on this machine died without a word (SIGKILL, power). Writes to MLflow.

    Returns how many there were. Raises ServiceError and SettingsError.
    """
    host = _this_process().split()[0]
    ended = 0
    with translated("looking for abandoned runs", tracking_uri):
        client = connect(tracking_uri)
        running = f"attributes.status = 'RUNNING' and tags.{TAG_PROCESS} LIKE '{host} %'"
        for run in client.search_runs([experiment_id], running, max_results=100):
            process = run.data.tags[TAG_PROCESS]
            if not _is_alive(process):
                reason = f"the process that watched over this run ({process}) died without a word"
                end_with(client, run.info.run_id, run.info.status, "KILLED", reason)
                ended += 1
    return ended


def system_monitor() -> tuple[Callable[[], dict[str, float]], float]:
    """A function that measures this machine as MLflow does, and how many seconds apart to call it.

    These are MLflow's own monitors: CPU, memory, disk and network of the whole machine, whichever process uses
    them, and every GPU. Its thread around them is not used: it asks the server before each sample and gives up for
    good the first time that there is no answer. The CPU is measured since the last call in the same thread.
    """
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    # mlflow has no types for these.
    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor]
    monitors = []
    for kind in kinds:
        # Each raises its own errors where there is no such GPU or no library to ask it.
        with contextlib.suppress(Exception):
            monitors.append(kind())

    def sample() -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}

    # The first measure of the CPU has nothing to compare with and says 0.
    sample()
    interval: Any = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
    return sample, float(interval.get() or SYSTEM_SECONDS)


# ---- values


def metrics_of(points: Sequence[Point], model_id: str | None = None) -> list[Metric]:
    """Points in MLflow's words. model_id: the logged model that they also belong to."""
    from mlflow.entities import Metric

    return [
        Metric(key(point.key), point.value, milliseconds(point.time), point.step, model_id=model_id) for point in points
    ]


def params_of(params: Mapping[str, str | int | float | bool]) -> dict[str, str]:
    """Params with the names and lengths that MLflow takes."""
    return {key(name): str(value)[:_PARAM_LENGTH] for name, value in params.items()}


def run_tags(tags: Mapping[str, str], note: str) -> dict[str, str]:
    """Tags of a run and of its model; the checksums are on the version, where a reader compares them."""
    kept = {name: value for name, value in tags.items() if name != TAG_HASHES}
    kept |= {
        "mlflow.source.name": "train-and-ship",
        "mlflow.source.type": "JOB",
        "mlflow.user": user(),
        "mlflow.note.content": note,
    }
    if commit := tags.get(TAG_COMMIT):
        kept["mlflow.source.git.commit"] = commit
    return {name: shorten(value, TAG_LENGTH) for name, value in kept.items()}


# ---- the steps


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        with passing_over(EXISTS):
            # The tag answers the question that the page would otherwise ask each visitor.
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise SettingsError(
            f"MLflow experiment {name!r} was deleted; restore it with `mlflow experiments restore` or rename the job"
        )
    return str(found.experiment_id)


def _differ(kept: Mapping[str, str], params: Mapping[str, str]) -> bool:
    """Whether MLflow would refuse these params because it keeps others; a run cut short may have none yet."""
    return any(kept.get(name, value) != value for name, value in params.items()) or bool(kept.keys() - params.keys())


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    listed = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(listed), BATCH_OF_PARAMS):
        client.log_batch(run_id, params=listed[start : start + BATCH_OF_PARAMS])


def _continue(client: MlflowClient, run: Run, note: str) -> None:
    """Make a run RUNNING again, watched over by this process."""
    from mlflow.entities import RunTag

    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    if TAG_FAILURE in run.data.tags:
        client.delete_tag(run.info.run_id, TAG_FAILURE)
    if run.data.tags.get(TAG_PROCESS) != _this_process():
        tags = {TAG_PROCESS: _this_process(), "mlflow.note.content": shorten(note, TAG_LENGTH)}
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _runs_of(client: MlflowClient, experiment_id: str, flow_run_id: str | None) -> list[Run]:
    """The newest first."""
    if not flow_run_id:
        return []
    if "'" in flow_run_id:
        raise ValueError(f"expected no quotation mark in {flow_run_id}")
    found = client.search_runs(
        [experiment_id],
        f"tags.{TAG_FLOW_RUN} = '{flow_run_id}'",
        max_results=10,
        order_by=["attributes.start_time DESC"],
    )
    return list(found)


def _this_process() -> str:
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time():.2f}"


def _is_alive(process: str) -> bool:
    """process: what `_this_process` said, on this machine."""
    _, pid, created = process.rsplit(" ", 2)
    with contextlib.suppress(psutil.NoSuchProcess):
        # A pid alone proves nothing: the kernel gives it to somebody else later.
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 0.05
    return False

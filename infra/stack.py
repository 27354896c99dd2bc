"""The local stack: an S3 server, an MLflow server, and a Prefect server with one worker, as plain processes.

    S3 ───────── bucket
    MLflow
    Prefect ──── work pool ──┬── worker
                             └── deployments of the flows

The three servers start at the same time. All state is in one folder (`settings.home`): s3, mlflow, prefect, logs and
pids. A part whose address is given in the environment is somebody else's: it is used, never started or stopped.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx

from train_and_ship.infra import automations, deployments, janitor
from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.components import (
    WORK_POOL,
    Component,
    answers,
    components,
    prefect_environment,
    python,
    require_only,
)
from train_and_ship.infra.doors.sigv4 import signed_get
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.home import make_folder, users_home
from train_and_ship.infra.job_environment import without_signing
from train_and_ship.infra.job_folders import add_job_folder
from train_and_ship.infra.locks import locked
from train_and_ship.infra.password import USER, make_password, read_password
from train_and_ship.infra.ports import port_is_free
from train_and_ship.infra.prefect_rest import ANSWER_SECONDS, prefect_api
from train_and_ship.infra.processes import PidFile, last_lines, start, stop
from train_and_ship.infra.settings import Settings, clone_folder
from train_and_ship.infra.stack_checks import Report, already_running, pid_file, require_ports

START_SECONDS = 90.0
"""How long a component may take until it answers. The slowest is MLflow: 15 s for a new database on a busy laptop."""
LOCK_SECONDS = 600.0
"""For another command that starts or stops the same stack."""
TRIES = round(START_SECONDS / ANSWER_SECONDS)
"""How often Prefect is asked whose answer does not come in time: it has just started, and so have its neighbours."""
POLL_SECONDS = 0.2

State = Literal["up", "down", "not answering", "external", "port taken"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """One row of `ship status`."""

    title: str
    url: str
    pid: int | None
    state: State


def status(settings: Settings) -> list[Status]:
    """The state of every part, without changing anything."""
    ours = {component.name: component for component in components(settings)}
    rows = []
    for name, title, address in (
        ("s3", "S3", settings.s3_endpoint or f"s3://{settings.bucket}"),
        ("mlflow", "MLflow", settings.mlflow_url),
        ("prefect", "Prefect", settings.prefect_ui_url),
        ("worker", "Prefect worker", "not ours: Prefect is external"),
    ):
        component = ours.get(name)
        if component is None:
            rows.append(Status(title=title, url=without_password(address), pid=None, state="external"))
            continue
        record = PidFile.read(pid_file(settings, name))
        process = record.process() if record else None
        if record is not None and process is not None:
            state: State = "up" if component.ready(record) else "not answering"
            rows.append(Status(title=title, url=component.url, pid=process.pid, state=state))
        else:
            taken = component.port is not None and not port_is_free(component.port) and not (record and record.family())
            rows.append(Status(title=title, url=component.url, pid=None, state="port taken" if taken else "down"))
    return rows


def up(settings: Settings, report: Report = lambda line: None, only: str = "") -> None:
    """Start what is not running, wait until everything answers, deploy the flows.

    only: names of PARTS that are started, with commas; the environment says where the others are. Empty for those that
    the environment does not say.

    Idempotent. Raises SettingsError before anything is started when a port is taken or the running stack has other
    settings; ServiceError when a component does not come up, after stopping what this call started.
    """
    if only:
        require_only(settings, only)
    with _exclusive(settings, report), _default_interrupt():
        if components(settings):
            make_password(settings.home)
        ours = components(settings)
        if any(component.name == "worker" for component in ours):
            named = clone_folder() or Path.cwd()
            # The shared stack may be started from anywhere, and a user's whole folder is no project.
            if not users_home().is_relative_to(named):
                add_job_folder(settings.home, named)
        for name in _external_names(ours):
            report(f"{name}: external, not started here")
        running = already_running(settings, ours, report)
        require_ports(settings, ours, running)
        with ThreadPoolExecutor(max_workers=6, thread_name_prefix="stack") as pool:
            # A mistake in prefect.yaml is shown, but is no reason to stop servers that are fine.
            for declared in _start_all(settings, ours, running, pool, report):
                declared.result()
        # Last: Prefect knows which runs still wait.
        if freed := janitor.clean(settings).freed:
            report(f"what runs left and nobody needs any more: {freed / 1e6:,.0f} MB deleted")


def down(settings: Settings, report: Report = lambda line: None) -> None:
    """Stop every process that the pid files prove to be ours, with all descendants. Idempotent; data stays."""
    if not settings.home.exists():
        return
    with _exclusive(settings, report):
        # The worker first, so that its runs end while the server can still write that down.
        stopped = stop([pid_file(settings, "worker")])
        server = PidFile.read(pid_file(settings, "prefect"))
        # Never on a server that merely has the same address.
        if server is not None and server.process() is not None and server.port == settings.prefect_port:
            with contextlib.suppress(ServiceError):
                _end_lost_runs(settings)
        stopped += stop([pid_file(settings, name) for name in ("prefect", "mlflow", "s3")])
        for name in stopped:
            report(f"{name}: stopped")


def _external_names(ours: list[Component]) -> list[str]:
    names = {component.name for component in ours}
    missing = [title for name, title in (("s3", "S3"), ("mlflow", "MLflow")) if name not in names]
    if "prefect" not in names:
        missing.append("Prefect (and with it the worker and the deployments)")
    return missing


@contextlib.contextmanager
def _exclusive(settings: Settings, report: Report) -> Iterator[None]:
    """One command at a time changes the stack of a home. The kernel frees the lock even after kill -9."""
    make_folder(settings.home)
    with locked(settings.home / "stack.lock", "changing this stack", LOCK_SECONDS, report):
        yield


@contextlib.contextmanager
def _default_interrupt() -> Iterator[None]:
    """Let children receive SIGINT even when we were started with `&`, which makes the whole line ignore it.

    An ignored signal stays ignored across exec, a handled one returns to its default; Prefect cancels runs by SIGINT.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _log(settings: Settings, name: str) -> Path:
    return settings.home / "logs" / f"{name}.log"


def _start_all(
    settings: Settings,
    ours: list[Component],
    running: Mapping[str, PidFile],
    pool: ThreadPoolExecutor,
    report: Report,
) -> list[Future[None]]:
    """Bring every component up; returns deployments and automations, which may still be at work.

    When one fails, those that this call started are stopped: half a stack would look like a whole one later.
    """
    by_name = {component.name: component for component in ours}
    begun: list[Component] = []
    deploying: list[Future[None]] = []
    automating: list[Future[None]] = []
    cancelled = threading.Event()

    def bring_up(name: str) -> None:
        if cancelled.is_set():
            return
        component = by_name[name]
        began = time.monotonic()
        record = running.get(name)
        if record is not None and component.ready(record):
            report(f"{component.title}: already up at {component.url}")
            return
        if record is not None and not _wait(settings, component, record, cancelled):
            # Alive but mute for so long: hung.
            stop([pid_file(settings, name)])
            record = None
        if record is None:
            begun.append(component)
            record = start(component, _log(settings, name), pid_file(settings, name))
            if not _wait(settings, component, record, cancelled):
                raise ServiceError(
                    f"{component.title} did not answer within {START_SECONDS:.0f} s. "
                    + _log_excerpt(_log(settings, name))
                )
        report(f"{component.title}: up at {component.url} ({time.monotonic() - began:.1f} s)")

    def s3() -> None:
        bring_up("s3")
        # Signed here: the usual case costs no client library.
        question = f"{settings.s3_endpoint}/{settings.bucket}?location"
        signed = signed_get(question, USER, read_password(settings.home) or "", datetime.now(UTC))
        if not answers(question, signed):
            from train_and_ship.infra.objectstore import ObjectStore

            ObjectStore.from_settings(settings).create_bucket_if_missing()

    def prefect() -> None:
        bring_up("prefect")
        _create_work_pool(settings)
        if "worker" not in running:
            _end_lost_runs(settings)
        deploying.append(pool.submit(deploy))
        automating.append(pool.submit(automate))
        bring_up("worker")

    def deploy() -> None:
        deployments.deploy(
            api=partial(_ask_prefect, settings),
            command=python("prefect", "--no-prompt", "deploy", "--all"),
            environment=without_signing(prefect_environment(settings)),
            state=settings.home / "prefect" / "deployed",
            report=report,
        )

    def automate() -> None:
        automations.automate(
            settings,
            command=python("train_and_ship.tasks.automations"),
            environment=without_signing(prefect_environment(settings), keep=["SHIP_NOTIFY"]),
            state=settings.home / "prefect" / "automated",
            report=report,
        )

    chains: list[Future[None]] = []
    for name, chain in (("s3", s3), ("mlflow", lambda: bring_up("mlflow")), ("prefect", prefect)):
        if name in by_name:
            chains.append(pool.submit(chain))
    try:
        done, _ = wait(chains, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        # The other chains must not start more behind our back.
        cancelled.set()
        wait(chains)
        stop([pid_file(settings, component.name) for component in begun])
        raise
    return [*deploying, *automating]


def _wait(settings: Settings, component: Component, record: PidFile, cancelled: threading.Event) -> bool:
    """Wait until the component answers: True, or False after START_SECONDS. Raises ServiceError when it dies first."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if record.process() is None:
            raise ServiceError(
                f"{component.title} ended while it was starting. " + _log_excerpt(_log(settings, component.name))
            )
        if component.ready(record):
            return True
        if cancelled.wait(POLL_SECONDS):
            raise ServiceError(f"{component.title}: given up because another part of the stack failed")
    return False


def _log_excerpt(log: Path) -> str:
    return f"The end of {log}:\n{last_lines(log)}"


def _ask_prefect(settings: Settings, method: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """What can be repeated, of a server that has just started."""
    return prefect_api(settings, method, path, body, tries=TRIES)


def _create_work_pool(settings: Settings) -> None:
    limit = {"concurrency_limit": settings.runs_at_once}
    reply = _ask_prefect(settings, "POST", "/work_pools/", {"name": WORK_POOL, "type": "process", **limit})
    if reply.status_code == httpx.codes.CONFLICT:
        # It is there already.
        reply = _ask_prefect(settings, "PATCH", f"/work_pools/{WORK_POOL}", limit)
    # The worker fills in the job template.
    if not reply.is_success:
        raise ServiceError(f"Prefect did not create the work pool {WORK_POOL!r}: {reply.status_code} {reply.text}")


def _end_lost_runs(settings: Settings) -> None:
    """Mark runs crashed whose worker is gone. Prefect would show them as running for ever."""
    lost = _ask_prefect(
        settings,
        "POST",
        "/flow_runs/filter",
        {
            "work_pools": {"name": {"any_": [WORK_POOL]}},
            "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
        },
    )
    state = {"type": "CRASHED", "name": "Crashed", "message": "The worker of the local stack was stopped."}
    for run in lost.json() if lost.is_success else []:
        _ask_prefect(settings, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})

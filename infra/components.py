"""The processes of the local stack, each as a value: what to run, where, and how to tell that it answers."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.job_environment import without_signing
from train_and_ship.infra.job_folders import WORKER
from train_and_ship.infra.password import read_password
from train_and_ship.infra.prefect_rest import http_client, prefect_api
from train_and_ship.infra.processes import PidFile, Program
from train_and_ship.infra.settings import HEARTBEAT_SECONDS, LOOPBACK, MLFLOW_ACCOUNT, Settings, without_proxy

WORK_POOL = "local"
WORKER_NAME = "local"
NAMES = (LOOPBACK, "localhost")
PASSWORD = "password"
"""In the configuration of a process: what its password is known by."""
INSTALLATION = "installation"
"""The same: the environment of Python that it runs in, which is shared with other clones and may be deleted."""
PARTS = {
    "s3": ("SHIP_BUCKET", "the bucket, and AWS_ENDPOINT_URL where it is not at AWS"),
    "mlflow": ("MLFLOW_TRACKING_URI", "the address of the MLflow server"),
    "prefect": ("PREFECT_API_URL", "the address of the Prefect server, with /api at its end"),
}
"""What `ship up --only` names, to the variable that names somebody else's, and what that holds."""


@dataclass(frozen=True, kw_only=True)
class Component(Program):
    """One process of the stack. Its name is also that of its pid file and log; its data is in its folder."""

    title: str
    url: str
    """Where to look at it."""
    port_variable: str | None = None
    """The environment variable that changes `port`."""
    ready: Callable[[PidFile], bool]
    """Whether it answers; raises nothing."""


def components(settings: Settings) -> list[Component]:
    """The components that are ours to run with these settings."""
    found = []
    if settings.s3_is_local:
        found.append(s3_component(settings))
    if settings.mlflow_is_local:
        found.append(mlflow_component(settings))
    if settings.prefect_is_local:
        found += [prefect_component(settings), _worker(settings)]
    return found


def require_only(settings: Settings, only: str) -> None:
    """Raises SettingsError unless the parts of the stack are those: the others are somebody else's.

    only: names of PARTS, with commas; Prefect's worker belongs to it.
    """
    wanted = [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in PARTS]:
        raise SettingsError(f"--only: expected some of {', '.join(PARTS)}, with commas, got {', '.join(unknown)!r}")
    ours = {component.name for component in components(settings)}
    for name, (variable, what) in PARTS.items():
        if name in wanted and name not in ours:
            raise SettingsError(
                f"--only: {name} is asked for, and the environment names somebody else's: unset {variable}"
                + (" and AWS_ENDPOINT_URL" if name == "s3" else "")
            )
        if name not in wanted and name in ours:
            raise SettingsError(
                f"--only {only}: {name} is not started here, and nothing says where it is: set {variable} to {what}"
            )


def s3_component(settings: Settings) -> Component:
    """The local S3 server."""
    folder = settings.home / "s3"
    return Component(
        name="s3",
        title="S3",
        url=f"http://{LOOPBACK}:{settings.s3_port}",
        argv=python("train_and_ship.infra.doors.s3_server"),
        environment={
            **without_signing(_environment(settings)),
            "BIND_HOST": LOOPBACK,
            "GATEWAY_PORT": str(settings.s3_port),
            "SERVICES": "s3",
            # On by default whatever SERVICES says, and the first listens on every interface whatever BIND_HOST says.
            "IOT_MTLS_ENABLED": "0",
            "SFTP_ENABLED": "0",
            # With a Docker socket it would remove the containers of any other MiniStack on this machine.
            "DOCKER_HOST": f"unix://{folder / 'no-docker.sock'}",
            "S3_PERSIST": "1",
            "PERSIST_STATE": "1",
            "S3_DATA_DIR": str(folder / "data"),
            "STATE_DIR": str(folder / "state"),
            "LOG_LEVEL": "WARNING",
        },
        folder=folder,
        port=settings.s3_port,
        port_variable="SHIP_S3_PORT",
        configuration={"SHIP_S3_PORT": str(settings.s3_port), **_known_by(settings)},
        ready=lambda _: answers(f"http://{LOOPBACK}:{settings.s3_port}/_ministack/health"),
    )


def mlflow_component(settings: Settings) -> Component:
    """The local MLflow server."""
    folder = settings.home / "mlflow"
    environment = without_signing(_environment(settings))
    # The server must use its own database, not itself.
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", *MLFLOW_ACCOUNT):
        environment.pop(variable, None)
    # Off: nothing here uses server-side jobs, and they double the start and cost 1 GB.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    return Component(
        name="mlflow",
        title="MLflow",
        url=settings.mlflow_url,
        argv=(
            *python("mlflow", "server", "--host", LOOPBACK, "--port", str(settings.mlflow_port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")),
            # Of pyproject.toml: infra/doors/mlflow_server.py.
            *("--app-name", "train-and-ship"),
            *("--allowed-hosts", ",".join((*NAMES, *(f"{name}:*" for name in NAMES)))),
            *("--cors-allowed-origins", ",".join(f"http://{name}:{settings.mlflow_port}" for name in NAMES)),
        ),
        environment=environment,
        folder=folder,
        port=settings.mlflow_port,
        port_variable="SHIP_MLFLOW_PORT",
        configuration={"SHIP_MLFLOW_PORT": str(settings.mlflow_port), **_known_by(settings)},
        ready=lambda _: answers(f"{settings.mlflow_url}/health"),
    )


def prefect_component(settings: Settings) -> Component:
    """The Prefect server, on a port of this machine and with SQLite."""
    origins = ",".join(f"http://{name}:{settings.prefect_port}" for name in NAMES)
    guarded = {
        "PREFECT_SERVER_API_AUTH_STRING": settings.prefect_account,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
    }
    server = "train_and_ship.infra.doors.prefect_server"
    return Component(
        name="prefect",
        title="Prefect",
        url=settings.prefect_ui_url,
        argv=python(server, "server", "start", "--host", LOOPBACK, "--port", str(settings.prefect_port)),
        environment={**without_signing(prefect_environment(settings)), **guarded},
        folder=settings.home / "prefect",
        port=settings.prefect_port,
        port_variable="SHIP_PREFECT_PORT",
        configuration={"SHIP_PREFECT_PORT": str(settings.prefect_port), **_known_by(settings)},
        ready=lambda _: answers(f"{settings.prefect_api_url}/health"),
    )


def _worker(settings: Settings) -> Component:
    # Everything its flow runs inherit. An address that changed while it runs would be ignored silently.
    addresses = {
        "PREFECT_API_URL": settings.prefect_api_url,
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
        "AWS_ENDPOINT_URL": settings.s3_endpoint or "",
        "SHIP_BUCKET": settings.bucket,
    }
    return Component(
        name="worker",
        title="Prefect worker",
        url=f"{settings.prefect_ui_url}/work-pools/work-pool/{WORK_POOL}",
        # It hands on to its flow runs what it holds, and the code of their jobs runs as the same user.
        argv=(
            *python("train_and_ship.infra.doors.worker", "worker", "start"),
            *("--pool", WORK_POOL, "--type", "process", "--name", WORKER_NAME),
        ),
        # Ten seconds, the default, is most of the time between a click and the first line of a short run.
        environment={**prefect_environment(settings), "PREFECT_WORKER_QUERY_SECONDS": "2", WORKER: "local"},
        folder=settings.home / "prefect",
        configuration={**addresses, **_known_by(settings)},
        ready=lambda record: _worker_is_online(settings, record),
    )


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Run a module of the environment this runs in, whatever PATH says; -P keeps the current folder out of it."""
    return (sys.executable, "-P", "-m", module, *arguments)


def _known_by(settings: Settings) -> dict[str, str]:
    """Where a process runs, and by what it has the password of today: nothing from which that could be found."""
    password = read_password(settings.home)
    known = {INSTALLATION: sys.prefix}
    return {**known, PASSWORD: hashlib.sha256(password.encode()).hexdigest()[:8]} if password else known


def _environment(settings: Settings) -> dict[str, str]:
    environment = settings.child_environment()
    scripts = str(Path(sys.executable).absolute().parent)
    environment["PATH"] = os.pathsep.join(part for part in (scripts, environment.get("PATH")) if part)
    # A company proxy must not be asked for our own machine.
    environment.update(without_proxy())
    environment["PYTHONUNBUFFERED"] = "1"
    environment["DO_NOT_TRACK"] = "1"
    return environment


def prefect_environment(settings: Settings) -> dict[str, str]:
    """Variables of the Prefect server and worker, and of what they start."""
    environment = _environment(settings)
    environment["PREFECT_HOME"] = str(settings.home / "prefect")
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_SECONDS)
    # A profile chosen for another server is not in this PREFECT_HOME, and its absence is an error.
    environment.pop("PREFECT_PROFILE", None)
    environment.pop("PREFECT_PROFILES_PATH", None)
    return environment


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a GET of the address succeeds. headers: of the request."""
    try:
        return http_client(False).get(url, timeout=3, headers=headers).is_success
    except httpx.HTTPError:
        return False


def _worker_is_online(settings: Settings, record: PidFile) -> bool:
    """Whether the server has heard from this worker, not from the one before it."""
    try:
        reply = prefect_api(settings, "POST", f"/work_pools/{WORK_POOL}/workers/filter", {})
    except ServiceError:
        return False
    for worker in reply.json() if reply.is_success else []:
        if worker["name"] == WORKER_NAME and worker["status"] == "ONLINE" and worker["last_heartbeat_time"]:
            return datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= record.create_time
    return False

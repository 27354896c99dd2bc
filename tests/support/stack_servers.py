"""S3, MLflow and Prefect servers as `ship up` starts them, each alone in a folder, which tests kill and start again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.support.new_databases import put_databases
from tests.support.passwords import put_password
from train_and_ship.infra.components import Component, mlflow_component, prefect_component, s3_component
from train_and_ship.infra.processes import PidFile, last_lines, start
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.stack import START_SECONDS


@dataclass
class StackServer:
    """A server of the local stack on a port of its own. What it knows is in the folder and survives its death."""

    folder: Path
    port: int
    running: PidFile | None = None

    def __post_init__(self) -> None:
        put_password(self.folder)

    component_of: ClassVar[Callable[[Settings], Component]]
    port_variable: ClassVar[str]

    @property
    def component(self) -> Component:
        settings = Settings.model_validate({"SHIP_HOME": self.folder, self.port_variable: self.port})
        return type(self).component_of(settings)

    @property
    def url(self) -> str:
        return self.component.url

    def start(self) -> None:
        """Returns when it answers."""
        component, log = self.component, self.folder / "log"
        self.running = start(component, log, self.folder / "pid.json")
        deadline = time.monotonic() + START_SECONDS
        while not component.ready(self.running):
            alive = self.running.process() is not None
            assert alive and time.monotonic() < deadline, last_lines(log, 100)
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and whatever it started."""
        leader = self.running.process() if self.running is not None else None
        if leader is not None:
            # All of them at the same moment: each component has a process group of its own.
            os.killpg(leader.pid, signal.SIGKILL)
            leader.wait()


class S3Server(StackServer):
    """A real S3 server (MiniStack)."""

    component_of = staticmethod(s3_component)
    port_variable = "SHIP_S3_PORT"


class MlflowServer(StackServer):
    """A real MLflow server."""

    component_of = staticmethod(mlflow_component)
    port_variable = "SHIP_MLFLOW_PORT"

    def __post_init__(self) -> None:
        super().__post_init__()
        put_databases(self.folder, "mlflow")


class PrefectServer(StackServer):
    """A real Prefect server."""

    component_of = staticmethod(prefect_component)
    port_variable = "SHIP_PREFECT_PORT"

    def __post_init__(self) -> None:
        super().__post_init__()
        put_databases(self.folder, "prefect")

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

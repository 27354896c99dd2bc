"""Before a stack is started: which of its parts run already, and whether the others can."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from train_and_ship.infra.addresses import recognisable
from train_and_ship.infra.components import INSTALLATION, PASSWORD, Component
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.password import FILE
from train_and_ship.infra.ports import free_ports, port_holder, port_is_free
from train_and_ship.infra.processes import PidFile, stop
from train_and_ship.infra.settings import Settings

Report = Callable[[str], None]


def pid_file(settings: Settings, name: str) -> Path:
    """Where it stands of a component which process that is."""
    return settings.home / "pids" / f"{name}.json"


def already_running(settings: Settings, ours: list[Component], report: Report) -> dict[str, PidFile]:
    """Components that are alive. Raises SettingsError when they were started with other settings."""
    wanted = {component.name: component for component in ours}
    running: dict[str, PidFile] = {}
    open_to_all = []
    elsewhere = set()
    for name in ("s3", "mlflow", "prefect", "worker"):
        record = PidFile.read(pid_file(settings, name))
        if record is None:
            continue
        if record.process() is None:
            # Killed from outside. Its children may still hold the port or, worse, train on.
            stop([pid_file(settings, name)])
            continue
        if name not in wanted:
            raise SettingsError(
                f"{name} of this stack is running (pid {record.pid}) although the environment now names another one: "
                "run `ship down` first"
            )
        where = record.configuration.get(INSTALLATION, "")
        if where and not Path(where).exists():
            report(f"{wanted[name].title}: ran in {where}, which is gone; it starts again in {sys.prefix}")
            stop([pid_file(settings, name)])
            continue
        if where not in ("", sys.prefix):
            elsewhere.add(where)
        for variable, value in wanted[name].configuration.items():
            was = record.configuration.get(variable)
            if variable == INSTALLATION:
                continue
            if variable == PASSWORD and was != value:
                if was is None:
                    open_to_all.append(name)
                    continue
                raise SettingsError(
                    f"{name} is running (pid {record.pid}) with another password than {settings.home / FILE}: "
                    "run `ship down` first"
                )
            if was != (now := recognisable(value)):
                raise SettingsError(
                    f"{name} is running (pid {record.pid}) with {variable}={was}, expected {now}: "
                    "run `ship down` first, or set the variable as it was"
                )
        running[name] = record
    if open_to_all:
        who = f"{', '.join(open_to_all)}: started by an earlier version, and ask for no password"
        if set(running) != set(wanted):
            # Those that are started now would ask, or be asked.
            raise SettingsError(f"{who}: run `ship down` first")
        report(f"{who}; `ship down` and `ship up` when no run is at work")
    for where in sorted(elsewhere):
        report(
            f"this stack runs in {where}, and its worker with the version there; `ship down` and `ship up` move it here"
        )
    return running


def require_ports(settings: Settings, ours: list[Component], running: Mapping[str, PidFile]) -> None:
    """Raises SettingsError when a port is asked for twice or held by somebody else, another stack of this user too."""
    owners: dict[int, Component] = {}
    taken: list[Component] = []
    for component in ours:
        if component.port is None:
            continue
        if (other := owners.setdefault(component.port, component)) is not component:
            raise SettingsError(
                f"{other.port_variable} and {component.port_variable} are both {component.port}: "
                "every server needs its own port"
            )
        if component.name not in running and not port_is_free(component.port):
            taken.append(component)
    if not taken:
        return
    holders = {component.title: port_holder(component.port or 0) for component in taken}
    ports = ", ".join(f"{component.port} for {component.title}" for component in taken)
    free = zip(taken, free_ports(len(taken)), strict=True)
    variables = " ".join(f"{component.port_variable}={port}" for component, port in free)
    ways = [f"export {variables}, which are free, wherever this stack is used"]
    if shared := {holder.home for holder in holders.values()} - {"", str(settings.home)}:
        home = shlex.quote(min(shared))
        ways = [f"share it: export SHIP_HOME={home}", f"end it: SHIP_HOME={home} ship down", *ways]
    raise SettingsError(
        f"this stack ({settings.home}) cannot start, its ports are taken ({ports}) by "
        + ", ".join(dict.fromkeys(str(holder) for holder in holders.values()))
        + "; "
        + "; or ".join(ways)
    )

"""torchrun over several machines that a command reaches, such as ssh. There is no engine, so one process plays it.

`torchworker.torchrun_controller` holds the store where the machines meet, keeps one connection to each and outlives
the flow. Each machine runs torchrun under `torchworker.lease`, which ends it when the connection goes quiet: a machine
that was cut off would otherwise compute for minutes without anybody knowing.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_and_ship.infra import processes
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.job_environment import for_launcher
from train_and_ship.infra.launchers.spec import Spec, Status
from train_and_ship.infra.launchers.torchrun import agent_argv, environment
from train_and_ship.infra.processes import PidFile, Program, last_lines

PLAN, ENDED, PID_FILE, LOG = "hosts.plan.json", "hosts.ended.json", "hosts.pid.json", "hosts.log"
"""Files in the attempt's folder: what to start, how it ended, which process looks after it, what that one printed."""
ANY_PORT = "@PORT@"
LEASE_SECONDS = 60.0
"""How long a machine goes on without a word from the controller."""
SSH = (
    "ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=5", "-oServerAliveCountMax=3", "{host}",
    "{command}",
)  # fmt: skip
"""A machine that went away is noticed after 15 s even if nothing is said."""


def host_argv(spec: Spec, host: str, connect: tuple[str, ...], address: str, port: int) -> tuple[str, ...]:
    """What is started here to run torchrun there.

    Args:
        spec: the job.
        host: the machine; `user@` before it is for the connection only.
        connect: argument list with {host} and {command}.
        address: of this machine, where the hosts meet.
        port: of this machine; 0 leaves it to the controller.
    """
    agent = agent_argv(
        spec,
        endpoint=f"{address}:{port or ANY_PORT}",
        local_addr=host.rpartition("@")[2],
        is_host="0",
    )
    variables = [f"{name}={value}" for name, value in environment(spec).items()]
    lease = (spec.python, "-P", "-m", "torchworker.lease", f"{LEASE_SECONDS:g}")
    command = shlex.join(["env", *variables, *lease, *agent])
    return tuple(part.replace("{host}", host).replace("{command}", command) for part in connect)


def plan(spec: Spec, launcher: HostsLauncher) -> dict[str, Any]:
    """What `torchworker.torchrun_controller` is told."""
    chosen = launcher.hosts[: spec.nodes]
    return {
        "address": launcher.address,
        "port": launcher.port,
        "min_nodes": spec.min_nodes,
        "time_limit": spec.time_limit,
        # Their values are in the controller's environment, and go to the machines through standard input.
        "given": sorted(spec.given),
        "hosts": {
            host: host_argv(spec, host, launcher.connect, launcher.address, launcher.port) for host in chosen
        },
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HostsLauncher:
    """Job ids are the folders of attempts."""

    hosts: tuple[str, ...]
    """Names or addresses by which the connection and the other machines reach each machine."""
    address: str
    """Address of this machine, on which the store listens and by which the machines reach it."""
    port: int = 0
    """Of the store; 0: any that is free."""
    connect: tuple[str, ...] = SSH
    """Argument list in which {host} and {command} are filled in; {command} is one line for a shell."""
    python: str = sys.executable
    """What the controller runs under, on this machine: the torch at both ends of its store is one version."""
    environment: Mapping[str, str] | None = None
    """Variables of the process that looks after the machines; None: what it needs of this process's."""

    def launch(self, spec: Spec) -> str:
        """As `Launcher` says."""
        if spec.nodes > len(self.hosts):
            raise JobError(f"train.launcher.torchrun.hosts: expected {spec.nodes} hosts, got {len(self.hosts)}")
        pid_file = spec.out_dir / PID_FILE
        if PidFile.read(pid_file) is None:
            (spec.out_dir / PLAN).write_text(json.dumps(plan(spec, self), indent=1))
            controller = Program(
                name=spec.name,
                argv=[self.python, "-P", "-m", "torchworker.torchrun_controller", str(spec.out_dir)],
                environment={
                    **(for_launcher(os.environ) if self.environment is None else self.environment),
                    **spec.given,
                },
                folder=spec.out_dir,
            )
            processes.start(controller, spec.out_dir / LOG, pid_file)
        return str(spec.out_dir)

    def status(self, job: str) -> Status:
        """As `Launcher` says."""
        folder = Path(job)
        record = PidFile.read(folder / PID_FILE)
        running = record is not None and record.process() is not None
        # In this order: it writes the file and then ends.
        if (folder / ENDED).exists():
            said = json.loads((folder / ENDED).read_text())
            return Status("ended", said["reason"], said["blames"])
        if running:
            return Status("running")
        if record is None:
            return Status("unknown", f"nothing was started for {folder}")
        return Status(
            "ended", f"the process that looks after the hosts ended without a word; its log: {folder / LOG}", ""
        )

    def cancel(self, job: str, grace_s: float = 10.0) -> None:
        """As `Launcher` says."""
        processes.stop([Path(job) / PID_FILE], grace_s)

    def logs(self, job: str) -> str:
        """As `Launcher` says."""
        shown = [Path(job) / LOG, *sorted(Path(job).glob("host-*.log"))]
        return "\n".join(f"{log.name}:\n{last_lines(log)}" for log in shown if log.exists())

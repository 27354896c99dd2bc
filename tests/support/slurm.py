"""A real Slurm cluster of the lab's hosts: munge, slurmctld on the controller and a slurmd on each host."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import network_namespaces
from tests.support.network_namespaces import CONTROLLER, Lab

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
START_SECONDS = 60

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=10
MinJobAge=3600
KillWait=2
InactiveLimit=0
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None when there can."""
    if reason := network_namespaces.missing():
        return reason
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return (
            f"no Slurm: {', '.join(lacking)} not installed "
            "(Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
        )
    return None


class Cluster:
    """Slurm on a lab's hosts, in a folder of its own."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        # Short: a socket's path may have 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ship-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        (self.folder / "state").mkdir()
        nodes = [
            f"NodeName={host} NodeAddr={self.lab.addresses[host]} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for host in self.lab.hosts
        ]
        text = CONFIGURATION.format(address=self.lab.addresses[CONTROLLER], folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._daemon("munged", ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files])
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", self.lab.on(CONTROLLER, "slurmctld", "-D"))
        for host in self.lab.hosts:
            self.node_up(host)
        self.wait_idle()

    def node_up(self, host: str) -> None:
        """Start (again) the host's slurmd."""
        self.lab.plug(host)
        self._daemon(host, self.lab.on(host, "slurmd", "-D", "-N", host))

    def wait_idle(self) -> None:
        self._until(lambda: self.states() == {"idle"}, "idle nodes")

    def states(self) -> set[str]:
        return set(self.ask("sinfo", "--noheader", "--Node", "--format=%T").split())

    def command(self, *argv: str) -> list[str]:
        """The argv that runs this on the controller."""
        return ["ip", "netns", "exec", self.lab.namespace(CONTROLLER), *argv]

    def ask(self, *argv: str) -> str:
        return subprocess.run(self.command(*argv), env=self.environment, capture_output=True, text=True).stdout

    def down(self) -> None:
        for process in reversed(self._daemons.values()):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, name: str, argv: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                argv, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            logs = "\n".join(path.read_text(errors="replace")[-800:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"no {what} within {START_SECONDS} s\n{logs}"
            time.sleep(0.1)

"""Slurm: one batch job, one torchrun a node, through sbatch, scontrol, squeue and scancel.

Slurm's own requeueing is off: it would run the job again in the same folder, and holds it for two minutes first. A
lost job is launched again by whoever waits for it, with a new name and a new folder.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.launchers.spec import Engine, Spec, State, Status
from train_and_ship.infra.launchers.torchrun import agent_argv, environment, shell_line
from train_and_ship.infra.processes import last_lines

LOG = "slurm.log"
PORT = 29400
PORTS = 1000
"""The store's port is spread over this many by job number: jobs may share a node."""
FORWARDED = ("HOME", "USER", "PATH", "LANG")
"""All that a job inherits of who submits it, beside Slurm's own variables, so that credentials stay where they are."""
UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
BLAMES = {
    "NODE_FAIL": "Slurm lost a node",
    "TIMEOUT": "the job reached its time limit",
    "DEADLINE": "the job reached its deadline",
    "OUT_OF_MEMORY": "the job ran out of the memory it asked for",
    "PREEMPTED": "Slurm gave the nodes to another job",
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "the job was cancelled in Slurm",
}


def _address(node: str) -> str:
    """A shell expression: the address by which Slurm itself reaches a node, whatever the resolver says."""
    return f"$(scontrol show node --oneliner {node} | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')"


def script(spec: Spec, arguments: Sequence[str] = ()) -> str:
    """The batch script. arguments: further options of sbatch, such as `--partition=gpu`."""
    options = [
        f"--job-name={spec.name}",
        f"--nodes={spec.nodes}",
        "--ntasks-per-node=1",
        f"--output={spec.out_dir / LOG}",
        f"--chdir={spec.out_dir}",
        # All of what `submission` has left. A list here, or NONE, has the node run a login shell of the user first, and
        # a profile that waits for something holds the job until Slurm gives up the node.
        "--export=ALL",
        "--no-requeue",
    ]
    if spec.cpus:
        options.append(f"--cpus-per-task={spec.cpus}")
    if spec.mem_mb:
        options.append(f"--mem={spec.mem_mb}M")
    if spec.gpus:
        options.append(f"--gpus-per-node={spec.gpus}")
    if spec.time_limit:
        options.append(f"--time={-(-spec.time_limit // 60)}")
    if spec.elastic:
        options.append("--no-kill")
    options += arguments
    # A node that is lost must not end the others when the job can go on without it; else it ends them at once.
    step = "--no-kill --kill-on-bad-exit=0" if spec.elastic else "--kill-on-bad-exit=1"
    agent = agent_argv(spec, endpoint="@HEAD@:@PORT@", local_addr="@SELF@", is_host="@IS_HOST@")
    line = shell_line(
        agent, {"HEAD": '"$head"', "PORT": '"$port"', "SELF": '"$self"', "IS_HOST": "$((SLURM_NODEID == 0))"}
    )
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment(spec).items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "set -eu",
            *exports,
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export head=" + _address('"$first"'),
            f"export port=$(({PORT} + SLURM_JOB_ID % {PORTS}))",
            f"srun --export=ALL --ntasks-per-node=1 {step} bash -c {shlex.quote(_on_node(line))}",
            "",
        ]
    )


def submission(spec: Spec, arguments: Sequence[str] = ()) -> str:
    """What a POSIX shell does, where Slurm's commands are, to submit the script with no more of its environment than
    FORWARDED, Slurm's own variables, and what the job is given, which is in neither script nor arguments."""
    kept = "|".join((*FORWARDED, "SLURM_*", "SBATCH_*"))
    return "\n".join(
        [
            "for name in $(env | sed -n 's/^\\([A-Za-z_][A-Za-z0-9_]*\\)=.*/\\1/p'); do",
            f'  case $name in SBATCH_EXPORT) unset "$name" ;; {kept}) ;; *) unset "$name" 2> /dev/null ;; esac',
            "done",
            *(f"export {name}={shlex.quote(value)}" for name, value in spec.given.items()),
            f"exec sbatch --parsable <<'END-OF-{spec.name}'",
            f"{script(spec, arguments)}END-OF-{spec.name}",
            "",
        ]
    )


def _on_node(line: str) -> str:
    return "self=" + _address('"$SLURMD_NODENAME"') + f"; exec {line}"


def status_of(record: str) -> Status:
    """From a line of `scontrol show job --oneliner`."""
    fields = dict(re.findall(r"(\S+?)=(\S*)", record))
    said = fields["JobState"]
    state: State = "queued" if said in WAITING else "running" if said in RUNNING else "ended"
    reason = fields.get("Reason", "None")
    words = f"Slurm job {fields['JobId']} is {said}" + (f" ({reason})" if reason != "None" else "")
    if state == "ended":
        words += f", exit code {fields.get('ExitCode', '?')}"
    return Status(state, words, BLAMES.get(said, ""))


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher:
    """Job ids are Slurm's job numbers."""

    arguments: tuple[str, ...] = ()
    """Further options of sbatch."""
    prefix: tuple[str, ...] = ()
    """Put before every command of Slurm, such as `ssh login`."""
    environment: Mapping[str, str] | None = None
    """Variables of Slurm's commands; None: inherited."""

    def launch(self, spec: Spec) -> str:
        """As `Launcher` says."""
        # A process that died between sbatch and noting the number finds its job by name.
        listed = self._engine.run("squeue", "--noheader", "--states=all", f"--name={spec.name}", "--format=%A")
        if listed:
            return listed.split()[0]
        return self._engine.run("sh", "-s", stdin=submission(spec, self.arguments), name="sbatch").split(";")[0]

    def status(self, job: str) -> Status:
        """As `Launcher` says."""
        try:
            done = self._engine.ask("scontrol", "show", "job", "--oneliner", job)
        except ServiceError as error:
            return Status("unreachable", str(error))
        if done.returncode == 0:
            found = status_of(done.stdout)
            return self._name_node(done.stdout, found) if found.blames == BLAMES["NODE_FAIL"] else found
        if "Invalid job id" in done.stderr:
            return Status("unknown", f"Slurm does not know job {job} (any more)")
        return Status("unreachable", done.stderr.strip())

    def _name_node(self, record: str, found: Status) -> Status:
        """The same status with the node that is down; a job's record does not hold it."""
        nodes = re.search(r" NodeList=(\S+)", record)
        if nodes is None:
            return found
        listed = self._engine.ask("sinfo", "--noheader", "--Node", f"--nodes={nodes[1]}", "--format=%N %T").stdout
        down = {line.split()[0] for line in listed.splitlines() if " down" in line}
        return replace(found, blames=f"{found.blames}: {', '.join(sorted(down))}") if down else found

    def cancel(self, job: str, grace_s: float = 10.0) -> None:
        """As `Launcher` says."""
        if self.status(job).over:
            return
        # SIGTERM, then SIGKILL after Slurm's KillWait; we do not wait longer than we were told to.
        self._engine.ask("scancel", job)
        if self._over_within(job, grace_s):
            return
        self._engine.ask("scancel", "--signal=KILL", "--full", job)
        if not self._over_within(job, grace_s):
            raise ServiceError(f"Slurm job {job} did not end within {2 * grace_s:g} s of being cancelled")

    def _over_within(self, job: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.status(job).over:
                return True
            time.sleep(0.2)
        return False

    def logs(self, job: str) -> str:
        """As `Launcher` says."""
        done = self._engine.ask("scontrol", "show", "job", "--oneliner", job)
        found = re.search(r" StdOut=(\S+)", done.stdout)
        return last_lines(Path(found[1])) if found else ""

    @property
    def _engine(self) -> Engine:
        return Engine(self.prefix, self.environment, UNREACHABLE)

"""What is launched, and the four things every engine can do with it. No engine in here.

Making the value (an argv, a job script, a manifest) is separate from running it, so a test or a curious person can
look at what would be run. The engine says where a job is; whether it succeeded is read from the job's own result.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from train_and_ship.infra.errors import JobError, ServiceError, SettingsError
from train_and_ship.infra.job_environment import VARIABLE

NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
"""A DNS label with room for the suffixes that Kubernetes adds to it."""
COMMAND_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One attempt of one job, the same for every engine."""

    name: str
    """Unique for the attempt. Launching the same name again finds the job that is already there."""
    argv: Sequence[str]
    """What each rank runs, as torchrun takes it: `-m torchworker.rank /…/request.json`."""
    out_dir: Path
    """Absolute folder that every node sees under this path, new for this attempt."""
    nodes: int
    """Machines; one torchrun each."""
    min_nodes: int
    """Go on with as few as this when machines are lost; equal to `nodes` for a job of fixed size."""
    nproc: int
    """Ranks on each machine."""
    python: str
    """Interpreter that has torch and torchworker, on every machine."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of the ranks. Shows in process lists, job scripts and manifests: not for secrets."""
    given: Mapping[str, str] = field(default_factory=dict)
    """The same, passed on through standard input alone. Kubernetes has `secret` for them instead."""
    cpus: int | None = None
    """Cores on each machine."""
    mem_mb: int | None = None
    """Memory on each machine, MiB."""
    gpus: int = 0
    """GPUs on each machine."""
    max_restarts: int = 0
    """How often torchrun starts all ranks again when one failed or a machine was lost."""
    image: str | None = None
    """Container image, where the engine runs containers."""
    time_limit: int | None = None
    """Seconds after which the engine ends the job."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: expected lower-case letters, digits and dashes, at most 52, got {self.name!r}")
        if not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(f"min_nodes: expected 1 to {self.nodes} (nodes), got {self.min_nodes}")
        if self.min_nodes < self.nodes and self.max_restarts < 1:
            raise ValueError("max_restarts: expected at least 1 when min_nodes is below nodes: going on is a restart")
        if not self.out_dir.is_absolute():
            raise ValueError(f"out_dir: expected an absolute path, got {self.out_dir}")
        if wrong := [name for name in (*self.env, *self.given) if not VARIABLE.fullmatch(name)]:
            raise ValueError(f"env: expected names of variables, got {', '.join(map(repr, wrong))}")

    @property
    def elastic(self) -> bool:
        """Whether the job may go on with fewer nodes."""
        return self.min_nodes < self.nodes


State = Literal["queued", "running", "ended", "unreachable", "unknown"]


@dataclass(frozen=True)
class Status:
    """What the engine says about a job."""

    state: State
    """`unreachable`: the engine did not answer, the job may well be running. `unknown`: it answered that it knows no
    such job (any more)."""
    reason: str = ""
    """The engine's own words when there is something to say."""
    blames: str = ""
    """A machine or limit that the engine holds responsible, in words; empty when it only saw an exit status."""

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.state in ("ended", "unknown")


class Launcher(Protocol):
    """An engine. Job ids are strings that mean something to a later process too."""

    def launch(self, spec: Spec) -> str:
        """Start the job, or find the one of this name that was started before; its id.

        Raises JobError when the engine refuses the job, ServiceError when it does not answer.
        """

    def status(self, job: str) -> Status:
        """Where the job is. Changes nothing."""

    def cancel(self, job: str, grace_s: float = 10.0) -> None:
        """End the job if it still runs, after at most `grace_s` seconds by force, and remove what the engine keeps of
        it. Cancelling twice, or after the end, is fine."""

    def logs(self, job: str) -> str:
        """The last lines that the job printed, as far as the engine still has them."""


class Engine:
    """The engine's command-line tools, started with an argument list, never through a shell."""

    def __init__(
        self, prefix: Sequence[str], environment: Mapping[str, str] | None, unreachable: Sequence[str]
    ) -> None:
        """prefix: put before every command (`ssh login`); unreachable: words by which a silent engine is recognised."""
        self._prefix, self._environment, self._unreachable = tuple(prefix), environment, tuple(unreachable)

    def ask(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command; a non-zero status is the caller's to judge.

        Raises ServiceError when the engine does not answer, SettingsError when the command is not installed.
        """
        whole = [*self._prefix, *argv]
        try:
            done = subprocess.run(
                whole, input=stdin, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=self._environment
            )
        except FileNotFoundError:
            raise SettingsError(f"{whole[0]}: expected this command on PATH, found none") from None
        except subprocess.TimeoutExpired:
            raise ServiceError(f"{' '.join(whole[:2])}: no answer within {COMMAND_SECONDS} s") from None
        if done.returncode != 0 and any(word in done.stderr for word in self._unreachable):
            raise ServiceError(f"{argv[0]}: {last_line(done.stderr)}")
        return done

    def run(self, *argv: str, stdin: str = "", name: str = "") -> str:
        """Run a command that must succeed; what it printed.

        name: what a person calls it, if not by the first word. Raises JobError with the engine's words when it refuses.
        """
        done = self.ask(*argv, stdin=stdin)
        if done.returncode != 0:
            raise JobError(
                f"train.launcher: {name or argv[0]} refused the job: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout.strip()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""

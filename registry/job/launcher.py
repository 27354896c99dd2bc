"""The part of a job file that says which machines train: `train.launcher`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from train_and_ship.registry.job.base import Part


def _fills_in(value: tuple[str, ...]) -> tuple[str, ...]:
    whole = " ".join(value)
    if "{host}" not in whole or "{command}" not in whole:
        raise ValueError("an argument list with {host} and {command} in it, such as [ssh, '{host}', '{command}']")
    return value


def _not_ours(value: tuple[str, ...]) -> tuple[str, ...]:
    ours = {
        "job-name",
        "J",
        "nodes",
        "N",
        "output",
        "o",
        "chdir",
        "D",
        "requeue",
        "export",
        "array",
        "a",
        "ntasks",
        "n",
    }
    for argument in value:
        if not argument.startswith("-") or "\n" in argument:
            raise ValueError(f"options of sbatch such as --partition=gpu, not {argument!r}")
        if argument.lstrip("-").partition("=")[0] in ours:
            raise ValueError(f"options of sbatch other than {argument.partition('=')[0]}, which we set")
    return value


def _names(value: dict[str, str]) -> dict[str, str]:
    if wrong := [name for name in value if not name.isidentifier() or not name.isascii()]:
        raise ValueError(f"names of environment variables, and {wrong[0]!r} is none")
    return value


Arguments = Annotated[tuple[str, ...], Field(strict=False)]


class Machines(Part):
    """What every engine over several machines understands."""

    min_nodes: int | None = Field(None, ge=1)
    """go on with as few machines as this; all when absent"""
    time_limit_s: int | None = Field(None, ge=1)
    """seconds after which the engine ends the job"""
    python: str | None = None
    """interpreter with torchworker on every machine; when absent, the path that the job's code runs under here"""
    env: Annotated[dict[str, str], AfterValidator(_names)] = Field(default_factory=dict)
    """variables of the ranks; visible to others, so no secrets"""

    def _enough(self, nodes: int) -> None:
        if self.min_nodes is not None and self.min_nodes > nodes:
            raise ValueError(f"min_nodes <= {nodes}, the number of machines, not {self.min_nodes}")


class Local(Part):
    """This machine."""


class Torchrun(Machines):
    """Machines that a command such as ssh reaches, with one path for the run folder and the project on all."""

    hosts: Arguments = Field(min_length=1)
    """names or addresses of the machines, user@ allowed"""
    address: str = Field(min_length=1)
    """address of this machine, by which the hosts reach it"""
    port: int = Field(0, ge=0, le=65535)
    """port of this machine where the hosts meet; 0: any free one"""
    connect: Annotated[tuple[str, ...], AfterValidator(_fills_in)] | None = Field(None, strict=False)
    """argument list with {host} and {command}; ssh without questions when absent"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.hosts)) != len(self.hosts):
            raise ValueError("each host once")
        self._enough(len(self.hosts))
        return self


class Cluster(Machines):
    """What an engine that gives out machines is asked for."""

    nodes: int = Field(1, ge=1)
    """machines"""
    cpus: int | None = Field(None, ge=1)
    """cores on each machine"""
    mem_mb: int | None = Field(None, ge=1)
    """memory on each machine, MiB"""
    gpus: int = Field(0, ge=0)
    """GPUs on each machine"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._enough(self.nodes)
        return self


class Slurm(Cluster):
    """A Slurm cluster, through sbatch, squeue, scontrol and scancel on this machine."""

    arguments: Annotated[Arguments, AfterValidator(_not_ours)] = Field((), strict=False)
    """further options of sbatch, such as --partition=gpu"""
    prefix: Arguments = ()
    """put before every command of Slurm, such as [ssh, login]"""


class Kubernetes(Cluster):
    """A Kubernetes cluster, through kubectl on this machine; each of its machines is a pod."""

    image: str = Field(min_length=1)
    """container image with torchworker in it"""
    claim: str = Field(min_length=1)
    """PersistentVolumeClaim (ReadWriteMany) with runs and project on it"""
    mount: str = Field(pattern="^/")
    """where it is mounted: the path this machine knows it by"""
    namespace: str = "default"
    """where the job is created"""
    context: str | None = None
    """entry of the kubeconfig; its current one when absent"""
    secret: str | None = None
    """Secret whose keys become variables of the ranks"""


class Launcher(Part):
    """Where the ranks run: exactly one of these."""

    local: Local | None = None
    """this machine"""
    torchrun: Torchrun | None = None
    """machines that ssh reaches"""
    slurm: Slurm | None = None
    """a Slurm cluster"""
    kubernetes: Kubernetes | None = None
    """a Kubernetes cluster"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        # A release's own job.json names the others with null.
        if sum(getattr(self, name) is not None for name in Launcher.model_fields) != 1:
            raise ValueError("local, or exactly one of torchrun, slurm, kubernetes with its options")
        return self

    @property
    def chosen(self) -> Local | Torchrun | Slurm | Kubernetes | None:
        """The engine and its options; None when it is `local` without any."""
        return self.local or self.torchrun or self.slurm or self.kubernetes

    @property
    def machines(self) -> Torchrun | Slurm | Kubernetes | None:
        """The engine over several machines; None for this one."""
        return self.torchrun or self.slurm or self.kubernetes

    @property
    def cpus(self) -> int | None:
        """Cores of each machine, where the job file says so."""
        return self.machines.cpus if isinstance(self.machines, Cluster) else None

    @property
    def nodes(self) -> int:
        """Machines, 1 for this one."""
        if self.torchrun is not None:
            return len(self.torchrun.hosts)
        return self.machines.nodes if isinstance(self.machines, Cluster) else 1


def _from_name(value: Any) -> Any:
    """`launcher: local` is short for `launcher: {local: {}}`."""
    return {value: {}} if isinstance(value, str) and value in Launcher.model_fields else value


Name = Literal["local", "torchrun", "slurm", "kubernetes"]
LauncherOption = Annotated[Launcher, BeforeValidator(_from_name, json_schema_input_type=Launcher | Name)]
"""What stands under `train.launcher`."""

LOCAL = Launcher(local=Local())


def check_train(launcher: Launcher, processes: int, restarts: int) -> None:
    """Raises ValueError when the machines cannot run equally many ranks, or may shrink but not start again."""
    if processes % launcher.nodes:
        raise ValueError(
            f"as many ranks on each machine: processes {processes} is not a multiple of {launcher.nodes} machines"
        )
    machines = launcher.machines
    if machines is not None and (machines.min_nodes or launcher.nodes) < launcher.nodes and restarts < 1:
        raise ValueError("restarts of at least 1 with min_nodes: going on with fewer machines is a restart")

"""Train on an engine that outlives this process: launch, or find what was launched, and wait. No Prefect here.

`<folder>/current.json` names the attempt that is under way: it is written before the engine is asked and removed when
the attempt is over. A process that finds it goes on waiting for that job. Every attempt has a folder of its own, so
nothing that an earlier one left can be taken for a result.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchworker.contract import (
    EVENTS,
    FAILURE_FILES,
    HUNG_FILES,
    LOST_CONNECTION,
    REQUEST,
    RESULT,
    Failure,
    Launches,
    Message,
    TrainRequest,
    TrainSettings,
)
from train_and_ship.infra.errors import JobError, ShipError, WorkerError
from train_and_ship.infra.fork_server import Events, Follower
from train_and_ship.infra.job_environment import values_of
from train_and_ship.infra.launchers.hosts import SSH, HostsLauncher
from train_and_ship.infra.launchers.kubernetes import KubernetesLauncher, Volume
from train_and_ship.infra.launchers.slurm import SlurmLauncher
from train_and_ship.infra.launchers.spec import Launcher, Spec, Status
from train_and_ship.infra.rundir import read_kept
from train_and_ship.registry.job import launcher as options

CURRENT = "current.json"
POLL_SECONDS = 0.5
FILES_SECONDS = 5.0
"""How long a shared file system may take to show what another machine wrote."""
END_SECONDS = 60.0
"""How long an engine may take to end a job that has written its result."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Attempt(Message):
    """What a later process needs to find the job again."""

    name: str
    inputs: str
    """Digest of everything the training depends on."""
    options: Mapping[str, Any]
    """`train.launcher` as it was."""
    job: str | None
    """The engine's id; None when the process died before it knew."""

    @property
    def engine(self) -> str:
        """Its name in the job file, such as `slurm`."""
        return next(iter(self.options))


def launcher_for(
    chosen: options.Torchrun | options.Slurm | options.Kubernetes, python: str = sys.executable
) -> Launcher:
    """The engine that a job file asks for. python: of the job's code, on this machine."""
    match chosen:
        case options.Torchrun():
            return HostsLauncher(
                hosts=chosen.hosts,
                address=chosen.address,
                port=chosen.port,
                connect=chosen.connect or SSH,
                python=python,
            )
        case options.Slurm():
            return SlurmLauncher(arguments=chosen.arguments, prefix=chosen.prefix)
        case options.Kubernetes():
            return KubernetesLauncher(
                namespace=chosen.namespace,
                context=chosen.context,
                volume=Volume(claim=chosen.claim, mount=chosen.mount),
                secret=chosen.secret,
            )


def spec_for(
    chosen: options.Launcher,
    train: TrainSettings,
    name: str,
    out_dir: Path,
    died: int = 0,
    given: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Spec:
    """One attempt as a value.

    Args:
        chosen: the engine and its options, as the job says.
        train: how to train.
        name: of the attempt.
        out_dir: its folder, which every machine sees under this path.
        died: launches that `train.restarts` has counted already.
        given: variables that the job names, with their values.
        python: of the job's code, on this machine, and on the others where the launcher names none.
    """
    machines, nodes = chosen.machines, chosen.nodes
    assert machines is not None
    min_nodes = machines.min_nodes or nodes
    resources = machines if isinstance(machines, options.Slurm | options.Kubernetes) else None
    image = machines.image if isinstance(machines, options.Kubernetes) else None
    return Spec(
        name=name,
        argv=("-m", "torchworker.rank", str(out_dir / REQUEST)),
        out_dir=out_dir,
        nodes=nodes,
        min_nodes=min_nodes,
        nproc=train.processes // nodes,
        python=machines.python or ("python" if image else python),
        env=machines.env,
        given=given or {},
        cpus=resources.cpus if resources else None,
        mem_mb=resources.mem_mb if resources else None,
        gpus=resources.gpus if resources else 0,
        # A job of fixed size is launched again from its newest checkpoint, with a fresh folder and rendezvous.
        # What torchrun starts again inside a job is of the same budget; rank 0 keeps it to the number.
        max_restarts=max(1, train.restarts - died) if min_nodes < nodes else 0,
        image=image,
        time_limit=machines.time_limit_s,
    )


async def train_launched(
    chosen: options.Launcher,
    request: TrainRequest,
    folder: Path,
    inputs: str,
    on_event: Events,
    say: Say,
    python: str = sys.executable,
) -> Path:
    """Train and return the attempt's folder, which holds what a local training stage holds.

    A cancelled caller cancels the job; a killed one leaves it running for the next call to find.

    Args:
        chosen: `train.launcher` of the job; its machines are not None.
        request: what to train and how; every machine sees its paths. Its folder gives way to that of the attempt.
        folder: existing folder for attempts, which every machine sees under this path.
        inputs: digest of everything that the training depends on.
        on_event: called with each event of the ranks.
        say: called with what a person should know of the engine.
        python: of the job's code, absolute.

    Raises:
        JobError: the user's code is at fault, or the engine refuses the job.
        WorkerError: a machine or a rank was lost.
    """
    assert chosen.machines is not None
    launcher = launcher_for(chosen.machines, python)
    current = folder / CURRENT
    attempt = await _attempt_under_way(current, inputs, chosen, say)
    out_dir = folder / attempt.name
    checkpoints = Path(request.checkpoints)
    named = request.project.env
    given = values_of(os.environ, named)
    deaths = Launches.so_far(checkpoints).deaths
    spec = spec_for(chosen, request.train, attempt.name, out_dir, deaths, given, python)
    try:
        if attempt.job is None:
            if named and chosen.kubernetes is not None:
                names = ", ".join(named)
                say(f"env: pods get {names} only where the Secret of train.launcher.kubernetes.secret has them")
            out_dir.mkdir(exist_ok=True)
            replace(request, folder=str(out_dir)).write(out_dir / REQUEST, durably=True)
            attempt = await _launch(launcher, spec, attempt, current)
            say(f"launched {attempt.engine} job {attempt.job}: {spec.nodes} machines, {spec.nproc} ranks each")
        assert attempt.job is not None
        status = await _wait(launcher, attempt.job, out_dir, on_event, say)
        logs = await asyncio.to_thread(_logs, launcher, attempt.job)
        # Also when all went well: an engine keeps records, services and connections.
        await asyncio.to_thread(launcher.cancel, attempt.job)
    except asyncio.CancelledError:
        await asyncio.shield(asyncio.to_thread(_cancel, current))
        raise
    except JobError:
        current.unlink(missing_ok=True)
        raise
    current.unlink()
    if not (out_dir / RESULT).exists():
        raise _judge(out_dir, spec, status, logs, request)
    return out_dir


async def _attempt_under_way(current: Path, inputs: str, chosen: options.Launcher, say: Say) -> Attempt:
    found = _read(current)
    if found is not None and found.inputs == inputs:
        say(f"found {found.engine} job {found.job or found.name} of an earlier process and wait for it")
        return found
    if found is not None:
        say(f"the job file changed: cancelling {found.engine} job {found.job or found.name}")
        await asyncio.to_thread(_cancel, current)
    name = f"ship-{uuid.uuid4().hex[:16]}"
    attempt = Attempt(name=name, inputs=inputs, options=chosen.model_dump(mode="json", exclude_unset=True), job=None)
    # Before the engine is asked: without it, the job would be nobody's after a power cut.
    attempt.write(current, durably=True)
    return attempt


async def _launch(launcher: Launcher, spec: Spec, attempt: Attempt, current: Path) -> Attempt:
    """Launch and note the engine's id, also when the caller is cancelled meanwhile."""
    launching = asyncio.ensure_future(asyncio.to_thread(launcher.launch, spec))
    try:
        await asyncio.wait({launching})
    finally:
        if not launching.done():
            await asyncio.wait({launching})
        if launching.exception() is None:
            attempt = replace(attempt, job=launching.result())
            attempt.write(current, durably=True)
    launching.result()
    return attempt


def _cancel(current: Path) -> None:
    """Cancel the attempt that the file names, and forget it."""
    found = _read(current)
    if found is not None and found.job is not None:
        machines = options.Launcher.model_validate(found.options).machines
        assert machines is not None
        launcher_for(machines).cancel(found.job)
    current.unlink(missing_ok=True)


def _read(current: Path) -> Attempt | None:
    return read_kept(current, Attempt.decoded)


async def _wait(launcher: Launcher, job: str, out_dir: Path, on_event: Events, say: Say) -> Status:
    follower = Follower(out_dir / EVENTS, on_event)
    said = ""
    finished: float | None = None
    while True:
        status = await asyncio.to_thread(launcher.status, job)
        follower.poll()
        if status.state in ("queued", "unreachable") and status.reason != said:
            said = status.reason
            say(said)
        if status.over:
            break
        if (out_dir / RESULT).exists():
            finished = finished or time.monotonic()
            if time.monotonic() - finished > END_SECONDS:
                break
        await asyncio.sleep(POLL_SECONDS)
    for _ in range(round(FILES_SECONDS / POLL_SECONDS)):
        if (out_dir / RESULT).exists() or any(out_dir.glob(FAILURE_FILES)):
            break
        await asyncio.sleep(POLL_SECONDS)
    follower.poll()
    return status


def _logs(launcher: Launcher, job: str) -> str:
    try:
        return launcher.logs(job)
    except ShipError as error:
        return f"(no logs: {error})"


def _judge(out_dir: Path, spec: Spec, status: Status, logs: str, request: TrainRequest) -> ShipError:
    """What the attempt ended with, which is counted: JobError when the same would happen again."""
    failures = [Failure.read(path) for path in sorted(out_dir.glob(FAILURE_FILES))]
    cause = _root_cause(failures, out_dir, spec, status)
    checkpoints = Path(request.checkpoints)
    end: Failure | None = cause
    if not cause.spent:
        launches = Launches.so_far(checkpoints).died(checkpoints, cause.place)
        launches.keep(checkpoints)
        end = launches.end(cause, request.train.restarts)
    if end is not None and end.kind == "user":
        return JobError("\n".join([f"{end.message}{_rank(end)}", *([end.traceback] if end.traceback else [])]))
    said = f"train: {(end or cause).message}{_rank(end or cause)}\n{status.reason}\n{logs}"
    return WorkerError(said.rstrip(), retryable=end is None)


def _rank(failure: Failure) -> str:
    return f" (rank {failure.rank})" if failure.rank is not None else ""


def _root_cause(failures: Sequence[Failure], out_dir: Path, spec: Spec, status: Status) -> Failure:
    """The user's exception, before what the engine blames, before what else the ranks said.

    When a machine is lost, all that the ranks of the others see is that their connection closed.
    """
    decided = [failure for failure in failures if failure.kind == "user" or failure.spent]
    if decided:
        return decided[0]
    own = [failure for failure in failures if LOST_CONNECTION not in failure.message]
    silent = sorted(set(range(spec.nodes * spec.nproc)) - {failure.rank for failure in failures})
    if hung := sorted(out_dir.glob(HUNG_FILES)):
        rank = hung[-1].name.removeprefix("hung-rank")
        return Failure(kind="worker", message=f"rank {rank} {hung[-1].read_text()}")
    if status.blames:
        return Failure(kind="worker", message=status.blames)
    if own:
        return own[0]
    if failures and silent:
        ranks = " and ".join(map(str, silent))
        message = f"rank {ranks} ended without a word (killed, or out of memory, or its machine lost)"
        return Failure(kind="worker", message=message)
    if failures:
        return failures[0]
    return Failure(kind="worker", message="the job ended without a result and no rank said why")

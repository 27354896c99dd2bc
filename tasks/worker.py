"""Call one stage in a worker process: write the request, wait, read the reply. No Prefect here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from torchworker.contract import (
    EVENTS,
    REQUEST,
    RESULT,
    Message,
    Project,
    RehearseRequest,
    RehearseResult,
    Reply,
    decode,
)
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.infra.fork_server import Events, ForkServer
from train_and_ship.infra.job_environment import given, how_to_name, mentioned, withheld
from train_and_ship.infra.processes import last_lines, memory_of
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.text import file_size

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a process may take that runs what others made."""

    seconds: float
    memory: int
    """Bytes, with all that it started."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of this machine."""
        return cls(seconds=settings.rehearsal_seconds, memory=settings.rehearsal_memory_limit())


async def ask_worker(
    fork_server: ForkServer,
    stage: str,
    request: Message,
    kind: type[Result],
    folder: Path,
    on_event: Events | None = None,
    limits: Limits | None = None,
) -> Result:
    """As `call_worker`, with the result as the class that it is.

    Args:
        fork_server: what forks the process.
        stage: which stage it runs.
        request: what it is asked.
        kind: class of the result.
        folder: where request, log and result lie; made when it is not there.
        on_event: called with each event of the stage while it works.
        limits: as of `call_worker`.
    """
    folder.mkdir(exist_ok=True)
    result: Result = decode(kind, await call_worker(fork_server, stage, request, folder, on_event, limits))
    return result


async def rehearse(
    fork_server: ForkServer, request: RehearseRequest, folder: Path, limits: Limits
) -> tuple[RehearseRequest, RehearseResult]:
    """Try a candidate beside what is live; alone where both together were killed for what they took.

    The live release may have taken it, and would keep every successor from being tried.

    Args:
        fork_server: what forks the process.
        request: what is tried.
        folder: where request, log and result lie.
        limits: of the process.

    Returns:
        What was asked at last, and the answer.
    """
    try:
        return request, await ask_worker(fork_server, "rehearse", request, RehearseResult, folder, limits=limits)
    except WorkerError as error:
        if error.retryable or request.live is None:
            raise
        problem = str(error).split("\n")[0]
    alone = replace(request, live=None)
    result = await ask_worker(fork_server, "rehearse", alone, RehearseResult, folder, limits=limits)
    return alone, replace(result, live_problem=problem)


async def call_worker(
    fork_server: ForkServer,
    stage: str,
    request: Message,
    folder: Path,
    on_event: Events | None = None,
    limits: Limits | None = None,
) -> Mapping[str, Any]:
    """The stage's result as plain JSON.

    Args:
        fork_server: what the worker process is forked from.
        stage: name of the stage, as in torchworker/stage.py.
        request: what is asked.
        folder: existing folder for request, reply, events and log.
        on_event: called with each event while the worker runs.
        limits: beyond which it is killed, where it runs what others made; None for none.

    Raises:
        JobError: the user's code, data or configuration is at fault.
        WorkerError: the worker died. Both name the log.
    """
    request.write(folder / REQUEST)
    log = folder / f"{stage}.log"
    project = getattr(request, "project", None)

    def killed(expected: str) -> WorkerError:
        said = f"{stage}: the worker process was killed: expected {expected}.\nLast lines of {log}:\n{last_lines(log)}"
        return WorkerError(said, retryable=False)

    def watch(pid: int) -> None:
        if limits is not None and (held := memory_of(pid)) > limits.memory:
            most = f"at most {file_size(limits.memory)} of memory (SHIP_REHEARSAL_MEMORY)"
            raise killed(f"{most}, got {file_size(held)}")

    try:
        async with asyncio.timeout(limits.seconds if limits is not None else None) as limit:
            status = await fork_server.run(
                stage,
                folder / REQUEST,
                log=log,
                # Only what runs the code of the job: the clean room has no use for a bucket.
                variables=given(os.environ, project.env) if isinstance(project, Project) else None,
                events=folder / EVENTS if on_event else None,
                on_event=on_event,
                watch=watch if limits is not None else None,
            )
    except TimeoutError:
        if not limit.expired() or limits is None:
            raise
        raise killed(f"a result within {limits.seconds:,.0f} s (SHIP_REHEARSAL_SECONDS), got none") from None
    if not (folder / RESULT).exists():
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise WorkerError(
            f"{stage}: the worker process {how} and left no result.\nLast lines of {log}:\n{last_lines(log)}"
        )
    reply = Reply.read(folder / RESULT)
    if reply.failure is not None:
        rank = f" (rank {reply.failure.rank})" if reply.failure.rank is not None else ""
        output = [f"Last output{rank}:", *reply.failure.output] if reply.failure.output else []
        if reply.failure.kind == "user":
            trace = [reply.failure.traceback] if stage == "train" and reply.failure.traceback else []
            lines = [f"{reply.failure.message}{rank}", *trace, *output]
            if isinstance(project, Project):
                lines += _missed(project, [*lines, reply.failure.traceback or ""])
            raise JobError("\n".join(lines))
        raise WorkerError(
            "\n".join(
                [f"{stage}: {reply.failure.message}{rank}", *(output or [f"Last lines of {log}:", last_lines(log)])]
            ),
            retryable=not reply.failure.spent,
        )
    assert reply.result is not None
    return reply.result


def _missed(project: Project, said: list[str]) -> list[str]:
    """A line on variables that an error of the job's code names, and that are set here and not passed on to it."""
    found = mentioned(withheld(os.environ, project.env), "\n".join(said))
    return [how_to_name(found)] if found else []

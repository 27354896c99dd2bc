"""Validation in the clean room; of formats that only load where they were made, there. No Prefect here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from torchworker.contract import RUN_IN_CPP, CppResult, ValidateRequest, ValidateResult
from train_and_ship.infra.fork_server import Events, ForkServer
from train_and_ship.tasks.at_work import now_at
from train_and_ship.tasks.rooms import Rooms
from train_and_ship.tasks.worker import ask_worker

WHERE_MADE = "where-made"
"""Folder inside of the stage's, where something is proven where it was made."""


async def ask_clean_room(
    rooms: Rooms,
    request: ValidateRequest,
    folder: Path,
    runners: Mapping[str, Future[CppResult]] | None = None,
    on_event: Events | None = None,
) -> ValidateResult:
    """The verdicts on every artifact. Either way no process can import the code of the job.

    Args:
        rooms: where each format is proven.
        request: about all formats; `cpp` as the job says it, or `off`.
        folder: where requests, logs and results lie.
        runners: of C++, by the path of the interpreter whose torch it is built against; None for none.
        on_event: called with each format that has been asked.

    Raises:
        JobError, WorkerError: as of `call_worker`.
    """
    there = rooms.where_made(request.formats, request.libraries)
    here = [kind for kind in request.formats if kind not in there]
    if not there:
        return await _ask(rooms.clean, request, folder, runners, on_event)
    results = []
    if here:
        # Libraries of operators are compiled against the other torch, and what is proven here has no use for them.
        part = _part(request, here, there)
        results.append(await _ask(rooms.clean, replace(part, libraries=()), folder, runners, on_event))
    place = folder / WHERE_MADE if here else folder
    results.append(await _ask(rooms.project, _part(request, there, here), place, runners, on_event))
    return _together(results)


def _part(request: ValidateRequest, formats: Sequence[str], others: Sequence[str]) -> ValidateRequest:
    """The same about some formats. That something has to run without Python is asked of those that can."""
    can, rest = (any(kind in RUN_IN_CPP for kind in kinds) for kinds in (formats, others))
    chosen = {kind: file for kind, file in request.formats.items() if kind in formats}
    return replace(request, formats=chosen, cpp="off" if rest and not can else request.cpp)


async def _ask(
    server: ForkServer,
    request: ValidateRequest,
    folder: Path,
    runners: Mapping[str, Future[CppResult]] | None,
    on_event: Events | None,
) -> ValidateResult:
    if runners is not None:
        built = runners.get(server.interpreter.path)
        if built is not None and not built.done():
            now_at("validate", ["the C++ runner is compiled, once on this machine"])
        runner = await asyncio.wrap_future(built) if built is not None else CppResult(runner="")
        now_at("validate", [*request.formats])
        request = replace(request, runner=runner.runner, no_runner=runner.reason)
    return await ask_worker(server, "validate", replace(request, log=str(folder)), ValidateResult, folder, on_event)


def _together(results: Sequence[ValidateResult]) -> ValidateResult:
    """One answer about all formats; each was asked the same questions."""
    first = results[0]
    return replace(
        first,
        verdicts=[item for result in results for item in result.verdicts],
        metrics={kind: values for result in results for kind, values in result.metrics.items()},
        standard_errors={kind: values for result in results for kind, values in result.standard_errors.items()},
        mismatches=sorted((item for result in results for item in result.mismatches), key=lambda item: -item.ratio),
        errors=[item for result in results for item in result.errors],
        int8={kind: found for result in results for kind, found in result.int8.items()},
    )

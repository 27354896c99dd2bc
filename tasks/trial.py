"""The untrained model, exported and held against itself: what would otherwise fail after training. No Prefect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchworker import situations
from torchworker.contract import ExportResult, Project, ScoreResult, Verdict
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.verdicts import verdict_table
from train_and_ship.tasks.clean_room import ask_clean_room
from train_and_ship.tasks.requests import export_request, score_request, validate_request
from train_and_ship.tasks.rooms import Rooms
from train_and_ship.tasks.shipped import shipped_files
from train_and_ship.tasks.worker import ask_worker

BATCHES = 2
"""Batches of validation samples that the artifacts are asked about."""


@dataclass(frozen=True, kw_only=True)
class TrialExport:
    """What could be made of the untrained model, and passed."""

    exported: ExportResult
    verdicts: list[Verdict]


async def try_export(rooms: Rooms, job: Job, project: Project, folder: Path, say: Callable[[str], None]) -> TrialExport:
    """Capture every format of the job, int8 variants aside, and ask each artifact in the clean room.

    Probes, metrics and their shapes are those of a run; limits of gates are not asked, as nothing is trained.

    Args:
        rooms: where workers are forked.
        job: whose formats.
        project: the user's code.
        folder: an existing one, for what is made.
        say: called with each thing that begins, and with each format that is ready.

    Raises:
        JobError: the model cannot be captured, or no release can have one of the files that the job ships.
        GateError: an artifact is not the model, or a metric cannot be computed from what it gives.
        WorkerError: a worker died.
    """
    work = folder / "export"
    limit = min(BATCHES * job.export.batch, job.export.validation_samples)
    say(f"capturing the untrained model: {', '.join(job.export.wanted)} …")

    def ready(event: dict[str, Any]) -> None:
        if "seconds" in event:
            say(f"{event['format']}: {event['event']} in {event['seconds']:.1f} s")

    request = replace(export_request(job, project, work, weights=""), validation_limit=limit, int8=())
    exported = await ask_worker(rooms.project, "export", request, ExportResult, work, ready)
    await asyncio.to_thread(shipped_files, job, Path(project.folder), work)
    say(f"asking the artifacts without your code: {', '.join(exported.artifacts)} …")
    asked = replace(validate_request(job, project, work, exported, folder / "validate"), gates=(), int8=None)
    result = await ask_clean_room(rooms, asked, folder / "validate", on_event=ready)
    verdicts = list(result.verdicts)
    if job.train.custom_metrics and result.passed:
        scored = await ask_worker(
            rooms.project, "score", score_request(job, project, work, exported), ScoreResult, folder / "score"
        )
        verdicts += scored.verdicts
    failed = [verdict for verdict in verdicts if verdict.ran and not verdict.passed]
    if failed:
        named = ", ".join(f"{item.format} {item.gate} ({item.case})" for item in failed)
        raise GateError(
            f"{job.name}: {situations.NOT_CAPTURED} {len(failed)} of {len(verdicts)} gates fail: {named}. A run would "
            "end so when its training is over; `ship check --no-export` leaves this out",
            verdict_table(verdicts).text(),
        )
    return TrialExport(exported=exported, verdicts=verdicts)

"""What the live release is asked about: inputs that its own files prepare, where the job says how. No Prefect here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchworker.contract import (
    LIVE_VALIDATION,
    VALIDATION,
    LiveInputsRequest,
    LiveInputsResult,
    Project,
    RehearsedRelease,
)
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.release.manifest import SHIPPED
from train_and_ship.tasks.worker import Limits, ask_worker

NAMED = 3
"""Files that changed are named up to so many."""


@dataclass(frozen=True, kw_only=True)
class LiveInputs:
    """The samples for the live release."""

    file: str = ""
    """Absolute; empty where they are the candidate's."""
    said: str = ""
    """In words, what is otherwise with them; empty where nothing is."""
    problem: str = ""
    """Why there are none."""


def changed_files(candidate: RehearsedRelease, live: RehearsedRelease) -> list[str]:
    """Files that both or one of them ships beside the model, and that are not the same."""
    names = sorted({*candidate.files, *live.files})
    return [name for name in names if _is_shipped(name) and candidate.files.get(name) != live.files.get(name)]


async def live_inputs(
    fork_server: ForkServer,
    project: Project,
    candidate: RehearsedRelease,
    live: RehearsedRelease | None,
    exported: Path,
    folder: Path,
    limits: Limits,
    batch: int,
) -> LiveInputs:
    """The held-out samples as the live release takes them.

    Args:
        fork_server: what forks the process that prepares them.
        project: names `data.for_live`; without it they are the candidate's, and files that changed are told.
        candidate: as it came from the bucket.
        live: as it came from the bucket, verified; None when nothing is live, or it is broken.
        exported: folder with the candidate's samples.
        folder: where request, log and result lie; is made.
        limits: of the process, which reads what somebody else may have made.
        batch: samples that are collated at once, as the export did.

    Raises:
        WorkerError: the machine is at fault.
    """
    if live is None:
        return LiveInputs()
    if project.for_live is None:
        # Raw inputs are prepared by each release itself.
        return LiveInputs(said=_warning(changed_files(candidate, live)) if project.raw is None else "")
    if not any(map(_is_shipped, live.files)):
        return LiveInputs(said="it ships no files, so that it was asked about inputs as the candidate takes them")
    request = LiveInputsRequest(
        project=project,
        folder=str(folder),
        validation=str(exported / VALIDATION),
        files=str(Path(live.folder) / SHIPPED),
        own_files=str(Path(candidate.folder) / SHIPPED),
        inputs=live.inputs,
        own_inputs=candidate.inputs,
        batch=1 if project.coupled else batch,
    )
    try:
        made = await ask_worker(fork_server, "live_inputs", request, LiveInputsResult, folder, limits=limits)
    except (JobError, WorkerError) as error:
        if error.retryable:
            raise
        return LiveInputs(problem=f"its inputs cannot be prepared with its own files: {str(error).splitlines()[0]}")
    told = f"its own files prepare {made.changed:,} of {made.samples:,} samples otherwise; it was asked about these"
    same = f"its own files prepare all {made.samples:,} samples as the candidate's do"
    return LiveInputs(file=str(folder / LIVE_VALIDATION), said=told if made.changed else same)


def _warning(changed: list[str]) -> str:
    if not changed:
        return ""
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return (
        f"{', '.join(changed[:NAMED])}{more} changed since it was made: if data.factory prepares inputs with that, it "
        "was asked about inputs that it was not trained on; data.for_live prepares them with its own, and data.raw "
        "leaves it to each release (serving-module.md)"
    )


def _is_shipped(name: str) -> bool:
    return name.startswith(f"{SHIPPED}/")

"""What the folder of a run tells about it, however far it came: the facts behind its report. Reads only.

A stage counts when it is complete and was made from what the stage before it is now: after the job was edited, what an
earlier attempt left behind the point where this one stopped is not its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchworker.contract import (
    EVENTS,
    RESULT,
    WARNINGS,
    ExportResult,
    InspectResult,
    MeasureResult,
    RehearseResult,
    Reply,
    ShownWarning,
    TrainResult,
    ValidateResult,
)
from torchworker.durable import write_durably
from train_and_ship.infra.json_lines import all_objects
from train_and_ship.infra.rundir import MANIFEST, TORN, file_sha256
from train_and_ship.registry.cost import Spent, read_costs
from train_and_ship.registry.data.checks import Report
from train_and_ship.registry.environments import Environments
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import KindChange
from train_and_ship.registry.made_of import Files
from train_and_ship.registry.release.documents import Kind, recall
from train_and_ship.registry.release.manifest import LINEAGE
from train_and_ship.registry.tracking.curves import Point, file_points, history_points

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INSPECT, TRAIN, EXPORT, VALIDATE = "inspect", "train", "export", "validate"
RELEASE, REHEARSE = "release", "rehearse"
"""Folders of the stages."""
ATTEMPTS = "train.attempts"
"""Folder of the attempts at training on an engine of its own, one folder each."""
FACTS, MADE_FROM, VERDICTS, COMPARED = "data.json", "made_from.json", "verdicts.json", "compared.json"
"""Written by stages into their folders: InspectResult, MadeFrom, ValidateResult and RehearseResult."""
FILES = "files"
"""Folder of the release's files in the folder of its stage."""
ABOUT, CHECKS, REGISTERED, AGAINST = "run.json", "data_checks.json", "registered.json", "against.json"
"""Written for this: About, registry.data.checks.Report, Registration and Against."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Which run it is."""

    job: Mapping[str, Any]
    flow_run_id: str
    flow_run_name: str
    git_commit: str
    snapshot: str
    """Hexadecimal SHA-256 of the data's manifest; empty when the job has no snapshot."""
    begun: str
    """UTC, ISO 8601."""
    environments: Environments | None = None
    """None where an older version has begun it."""


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """What it was trained with, when training started."""

    git_commit: str
    code: str
    """Fingerprint."""
    packages: Mapping[str, str]
    """Version by package."""
    files: Files | None = None
    """Source files as they were then, and what training opened; None where an older version has trained."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """The version in MLflow."""

    stage: str
    """Digest of the stage that it was made from."""
    release: str
    version: str
    version_url: str
    run_url: str


@dataclass(frozen=True, kw_only=True)
class Against:
    """What was live."""

    live: str
    """The release that the candidate was held against; empty when nothing was live."""
    speed: MeasureResult | None = None
    """What it recorded of itself when it was made."""
    changes: Sequence[KindChange] = ()
    """What makes the candidate another kind of thing than it."""
    not_understood: Sequence[str] = ()
    """What it says of itself that cannot be, in words."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the release says of how it came to be."""

    start: str = ""
    """The release whose weights training began with; empty when it began from scratch."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints: `code`, `data`, `config`."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What the stages wrote; None where the run did not come so far."""

    folder: Path
    job: Job
    about: About
    costs: Sequence[Spent]
    facts: InspectResult | None
    checks: Report | None
    made_from: MadeFrom | None
    trained: TrainResult | None
    points: Sequence[Point]
    """Learning curves, also of a training that did not end."""
    exported: ExportResult | None
    validated: ValidateResult | None
    lineage: Origin | None
    registered: Registration | None
    compared: RehearseResult | None
    against: Against | None
    warnings: Mapping[ShownWarning, Sequence[str]] = field(default_factory=dict)
    """What was shown in the logs, to the stages that it was shown in."""

    @property
    def release(self) -> str:
        """Id of the release; empty before there is one."""
        return self.registered.release if self.registered else ""


def stage_inputs(first: str, *more: str) -> str:
    """What a stage is made from, as its folder records it.

    Args:
        first: digest of the stage before, or of the job; `read_run` knows by it whether the stage counts.
        more: whatever else decides what comes out.
    """
    return " ".join([first, *more])


def write_fact(folder: Path, name: str, value: DataclassInstance) -> None:
    """Into the folder of a run: whole or not at all, also after a power cut."""
    write_durably(folder / name, _encoded(value))


def add_fact(work: Path, name: str, value: DataclassInstance) -> None:
    """Into the work folder of a stage, which is synced as a whole when the stage is complete."""
    (work / name).write_bytes(_encoded(value))


def _encoded(value: DataclassInstance) -> bytes:
    return json.dumps(dataclasses.asdict(value), indent=1).encode()


def recorded_job(folder: Path) -> Job | None:
    """The job of a run, as it was when the run began; None for a run that ended before that."""
    about = _read(About, folder, ABOUT)
    return Job.from_record(about.job) if about is not None else None


def registration(folder: Path) -> Registration | None:
    """The version in MLflow that the run has made; None before. The stage may have been begun again since."""
    return _read(Registration, folder, REGISTERED)


def read_run(folder: Path) -> RunFiles | None:
    """What the folder of a run tells. Reads only.

    Returns:
        None for a run that ended before it knew its job.
    """
    about = _read(About, folder, ABOUT)
    if about is None:
        return None
    job = Job.from_record(about.job)
    train = _complete(folder, TRAIN, job.training_digest())
    export = _complete(folder, EXPORT, _digest(train))
    validate = _complete(folder, VALIDATE, _digest(export))
    release = _complete(folder, RELEASE, _digest(validate))
    registered = registration(folder)
    if registered is not None and registered.stage != _digest(release):
        registered = None
    rehearse = _complete(folder, REHEARSE, registered.release if registered else None)
    inspect = _complete(folder, INSPECT, job.training_digest())
    trained = _result(TrainResult, train)
    return RunFiles(
        folder=folder,
        job=job,
        about=about,
        costs=read_costs(folder),
        facts=_read(InspectResult, inspect, FACTS),
        checks=_read(Report, folder, CHECKS) if inspect and job.data.checks is not None else None,
        made_from=_read(MadeFrom, train, MADE_FROM),
        trained=trained,
        points=history_points(trained.history) if trained else _unfinished(folder),
        exported=_result(ExportResult, export),
        validated=_read(ValidateResult, validate, VERDICTS),
        lineage=_read(Origin, release, f"{FILES}/{LINEAGE}"),
        registered=registered,
        compared=_read(RehearseResult, rehearse, COMPARED),
        against=read_against(rehearse),
        warnings=_warnings(folder),
    )


def read_against(rehearsal: Path | None) -> Against | None:
    """What was live, of a complete rehearsal. rehearsal: its folder."""
    return _read(Against, rehearsal, AGAINST)


def _complete(folder: Path, name: str, inputs: str | None) -> Path | None:
    """The stage's folder; None when it is not complete, or was made from something else. inputs: how they begin."""
    manifest = folder / name / MANIFEST
    if inputs is None or not manifest.is_file():
        return None
    try:
        made_from = str(json.loads(manifest.read_bytes())["inputs"])
    except TORN:
        # Whoever goes on with the run does the stage again.
        return None
    return folder / name if made_from.startswith(inputs) else None


def _digest(stage: Path | None) -> str | None:
    return file_sha256(stage / MANIFEST) if stage else None


def _read(kind: type[Kind], folder: Path | None, name: str) -> Kind | None:
    path = folder / name if folder else None
    try:
        return recall(kind, json.loads(path.read_bytes())) if path and path.is_file() else None
    except ValueError:
        # Torn by a power cut.
        return None


def _result(kind: type[Kind], stage: Path | None) -> Kind | None:
    """What the worker of a stage answered."""
    reply = _read(Reply, stage, RESULT)
    return recall(kind, reply.result) if reply else None


def _warnings(folder: Path) -> dict[ShownWarning, list[str]]:
    """Of every stage and attempt, in the order in which they were begun to be shown."""
    found: dict[ShownWarning, list[str]] = {}
    files = sorted(folder.glob(f"**/{WARNINGS}"), key=lambda path: path.stat().st_mtime)
    for path in files:
        stage = path.relative_to(folder).parts[0].partition(".")[0]
        for line in all_objects(path):
            shown = recall(ShownWarning, line)
            if shown is not None and stage not in (stages := found.setdefault(shown, [])):
                stages.append(stage)
    return found


def _unfinished(folder: Path) -> list[Point]:
    """Of the last attempt at a training that did not end, on this machine or on an engine's."""
    events = [*folder.glob(f"{TRAIN}.work/{EVENTS}"), *folder.glob(f"{ATTEMPTS}/*/{EVENTS}")]
    points = file_points(max(events, key=lambda path: path.stat().st_mtime)) if events else []
    return [point for point in points if not point.key.startswith(("steps/", "ranks/"))]

"""What the folder of a run tells about it, however far it came: the facts behind its report. Reads only.

A stage counts when it is complete and was made from what the stage before it is now: after the job was edited, what an
earlier attempt left behind the point where this one stopped is not its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_and_ship.infra.rundir import MANIFEST, file_sha256, write_whole
from train_and_ship.registry.cost import Spent, read_costs
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.tracking.curves import Point, file_points, history_points

Facts = Mapping[str, Any]
ABOUT, CHECKS, REGISTERED, AGAINST = "run.json", "data_checks.json", "registered.json", "against.json"
"""Written for this: what run it is; the data checks' findings; the version in MLflow; what was live."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Plain values as the stages wrote them; None where the run did not come so far."""

    folder: Path
    job: Job
    about: Facts
    costs: Sequence[Spent]
    facts: Facts | None
    """InspectResult."""
    checks: Facts | None
    """registry.data.checks.Report."""
    made_from: Facts | None
    """Commit, code fingerprint and packages when training started."""
    trained: Facts | None
    """TrainResult."""
    points: Sequence[Point]
    """Learning curves, also of a training that did not end."""
    exported: Facts | None
    """ExportResult."""
    validated: Facts | None
    """ValidateResult."""
    lineage: Facts | None
    """lineage.json of the release."""
    registered: Facts | None
    """`release`, `version`, `version_url`, `run_url`."""
    compared: Facts | None
    """RehearseResult."""
    against: Facts | None
    """`live`: what it was held against; `speed`: what that one recorded of itself, a MeasureResult, or None."""

    @property
    def release(self) -> str:
        """Id of the release; empty before there is one."""
        return str(self.registered["release"]) if self.registered else ""


def write_fact(folder: Path, name: str, value: Facts) -> None:
    """Whole or not at all."""
    write_whole(folder / name, json.dumps(value, indent=1).encode())


def read_run(folder: Path) -> RunFiles | None:
    """None for a run that ended before it knew its job."""
    about = _read(folder / ABOUT)
    if about is None:
        return None
    job = Job.model_validate(about["job"])
    train = _complete(folder, "train", job.training_digest())
    export = _complete(folder, "export", _digest(train))
    validate = _complete(folder, "validate", _digest(export))
    release = _complete(folder, "release", _digest(validate))
    registered = _read(folder / REGISTERED)
    if registered is not None and registered["stage"] != _digest(release):
        registered = None
    rehearse = _complete(folder, "rehearse", str(registered["release"]) if registered else None)
    trained = _result(train)
    inspect = _complete(folder, "inspect", job.training_digest())
    return RunFiles(
        folder=folder,
        job=job,
        about=about,
        costs=read_costs(folder),
        facts=_read(inspect / "data.json") if inspect else None,
        checks=_read(folder / CHECKS) if inspect and job.data.checks is not None else None,
        made_from=_read(train / "made_from.json") if train else None,
        trained=trained,
        points=history_points(trained["history"]) if trained else _unfinished(folder),
        exported=_result(export),
        validated=_read(validate / "verdicts.json") if validate else None,
        lineage=_read(release / "files" / "lineage.json") if release else None,
        registered=registered,
        compared=_read(rehearse / "compared.json") if rehearse else None,
        against=_read(rehearse / AGAINST) if rehearse else None,
    )


def _complete(folder: Path, name: str, inputs: str | None) -> Path | None:
    """The stage's folder; None when it is not complete, or was made from something else. inputs: how they begin."""
    manifest = folder / name / MANIFEST
    if inputs is None or not manifest.is_file():
        return None
    made_from = str(json.loads(manifest.read_text())["inputs"])
    return folder / name if made_from.startswith(inputs) else None


def _digest(stage: Path | None) -> str | None:
    return file_sha256(stage / MANIFEST) if stage else None


def _read(path: Path) -> Facts | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _result(stage: Path | None) -> Facts | None:
    reply = _read(stage / "result.json") if stage else None
    return reply["result"] if reply else None


def _unfinished(folder: Path) -> list[Point]:
    """Of the last attempt at a training that did not end, on this machine or on an engine's."""
    events = [*folder.glob("train.work/events.jsonl"), *folder.glob("train.attempts/*/events.jsonl")]
    points = file_points(max(events, key=lambda path: path.stat().st_mtime)) if events else []
    return [point for point in points if not point.key.startswith(("steps/", "ranks/"))]

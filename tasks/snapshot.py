"""The job's snapshot of data: known by its manifest, verified before anything reads it. No Prefect here."""

from __future__ import annotations

from pathlib import Path

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.data.snapshots import Stores, bring_snapshot, identify
from train_and_ship.registry.job.job import Job


def known_snapshot(settings: Settings, job: Job, project: Path) -> str:
    """Which data it is, by content: files that are as they were when they were hashed are not read again. Empty when
    the job has no snapshot. Raises JobError."""
    if job.data.snapshot is None:
        return ""
    return identify(job.data.snapshot, project, _stores(settings), settings.home).sha256


def verified_snapshot(settings: Settings, job: Job, project: Path) -> tuple[Path | None, str]:
    """Its folder, every file hashed, and which data it is; None and empty without one. Raises JobError."""
    if job.data.snapshot is None:
        return None, ""
    folder, contents = bring_snapshot(job.data.snapshot, project, _stores(settings), settings.snapshots, settings.home)
    return folder, contents.sha256


def _stores(settings: Settings) -> Stores:
    return lambda bucket: ObjectStore.from_settings(settings, bucket)

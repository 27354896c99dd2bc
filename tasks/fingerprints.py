"""Fingerprints of what a release is made from: code, data, job and installed packages. No Prefect here."""

from __future__ import annotations

import asyncio
from pathlib import Path

from torchworker.contract import InspectResult
from train_and_ship.infra.provenance import code_fingerprint, environment_lock
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.lineage import Inputs, config_digest


def data_fingerprint(facts: InspectResult) -> str:
    """Of both splits: what is held out decides on promotion, so it counts as well."""
    return f"{facts.train.fingerprint} {facts.validation.fingerprint}"


def snapshot_fingerprint(sha256: str) -> str:
    """The data's name where it is a snapshot. sha256: hexadecimal, of the snapshot's manifest."""
    return f"snapshot {sha256}"


async def code_and_packages(job: Job, project_folder: Path) -> tuple[str, dict[str, str]]:
    """Fingerprint of the code, and version by package, as they are now."""
    libraries = [project_folder / library for library in job.export.libraries]
    code, lock = await asyncio.gather(
        asyncio.to_thread(code_fingerprint, project_folder, libraries), asyncio.to_thread(environment_lock)
    )
    return code, dict(line.split("==", 1) for line in lock)


async def inputs_of(job: Job, project_folder: Path, data: str) -> Inputs:
    """Fingerprints of everything that a release of this job is made from, as it is now. data: that of the data."""
    code, packages = await code_and_packages(job, project_folder)
    return Inputs(code=code, data=data, config=config_digest(job), environment=packages)

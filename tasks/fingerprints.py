"""Fingerprints of what a release is made from: code, data, job and installed packages. No Prefect here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from torchworker.contract import InspectResult
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.infra.provenance import environment_lock
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.lineage import Inputs, config_digest
from train_and_ship.registry.made_of import Files, files_of


def data_fingerprint(facts: InspectResult) -> str:
    """Of both splits: what is held out decides on promotion, so it counts as well."""
    return f"{facts.train.fingerprint} {facts.validation.fingerprint}"


def snapshot_fingerprint(sha256: str) -> str:
    """The data's name where it is a snapshot. sha256: hexadecimal, of the snapshot's manifest."""
    return f"snapshot {sha256}"


def project_hashes(settings: Settings, project_folder: Path) -> FileHashes:
    """Hashes of the project's files, as they are remembered on this machine."""
    return FileHashes(settings.home, str(project_folder))


async def code_and_packages(
    settings: Settings, job: Job, project_folder: Path, interpreter: Interpreter | None = None
) -> tuple[str, Files, dict[str, str]]:
    """Fingerprint of the code, its files, and version by package, as they are now.

    Args:
        settings: where hashes of files are remembered.
        job: whose code.
        project_folder: absolute.
        interpreter: whose packages; those of this process when None.
    """
    hashes, sites = project_hashes(settings, project_folder), interpreter.sites if interpreter is not None else ()
    (code, files), lock = await asyncio.gather(
        asyncio.to_thread(files_of, job, project_folder, hashes, sites),
        asyncio.to_thread(environment_lock, sites, interpreter.version if interpreter is not None else ""),
    )
    return code, files, dict(line.split("==", 1) for line in lock)


async def inputs_of(
    settings: Settings,
    job: Job,
    project_folder: Path,
    data: str,
    samples: Mapping[str, int] | None = None,
    interpreter: Interpreter | None = None,
) -> Inputs:
    """Fingerprints of everything that a release of this job is made from, as it is now.

    Args:
        settings: where hashes of files are remembered.
        job: what a release is made of.
        project_folder: absolute.
        data: fingerprint of the data.
        samples: by split, where the data was read.
        interpreter: whose packages; those of this process when None.
    """
    code, files, packages = await code_and_packages(settings, job, project_folder, interpreter)
    return Inputs(
        code=code, data=data, config=config_digest(job), environment=packages, files=files, samples=samples or {}
    )

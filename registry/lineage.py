"""Whether there is anything to train on that the live release was not trained on: code, data, job, environment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchworker.contract import decode
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.diff import ReleaseRecord, flat, packages_of
from train_and_ship.registry.job.base import digest
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.made_of import Files, differences
from train_and_ship.registry.release.manifest import DATA, JOB, LINEAGE

_SILENT = "the live release does not say what it was trained on"
SHOWN, LONGEST_TEXT = 3, 200
"""Differences that are named, of the others it is said how many; and characters that are shown of one."""
NOT_TRAINED_ON = ("gates", "release", "retrain", "env", "python", "deploy")
"""Parts of a job that change what is done with a release, not what is in it; names without their values; and where an
environment is, whose packages tell what it is."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Fingerprints of all that makes a release what it is. What is equal here gives the same release again."""

    code: str
    data: str
    config: str
    environment: Mapping[str, str]
    """Version by package."""
    files: Files = field(default_factory=Files)
    """Beside the data."""
    samples: Mapping[str, int] = field(default_factory=dict)
    """By split; empty where the data was not read."""

    def digest(self, start: str, allowed: Collection[str] = ()) -> str:
        """16 hexadecimal digits.

        Args:
            start: The release whose weights training begins with; empty for none.
            allowed: In what the candidate may be of another kind than the live release: what was kept because nobody
                had allowed it is another question once somebody has.
        """
        environment = sorted(self.environment.items())
        # Nothing where there is none, as before such things were looked at.
        more: list[Any] = [sorted(allowed)] if allowed else []
        more += [found for found in (self.files.opened, self.files.named) if found]
        return digest([self.code, self.data, self.config, environment, start, *more])

    def recorded(self) -> dict[str, str]:
        """For the lineage of a release; its packages are a file of their own."""
        return {"code": self.code, "data": self.data, "config": self.config}


def config_digest(job: Job) -> str:
    """16 hexadecimal digits over what a release depends on: a gate that changed makes no other release."""
    return digest(_config(job))


def _config(job: Job) -> dict[str, Any]:
    document = job.model_dump(mode="json", exclude=set(NOT_TRAINED_ON))
    document["data"].pop("checks", None)
    document["data"].pop("group", None)
    document["data"].pop("for_live", None)
    return document


def recorded_files(release: ReleaseRecord) -> Files | None:
    """Which files a release was made of; None for one from before that was recorded."""
    try:
        said = release.document(LINEAGE).get("files")
        found: Files | None = decode(Files, said, lenient=True) if said else None
        return found
    except (TypeError, AttributeError):
        return None


def changes(inputs: Inputs, job: Job, live: ReleaseRecord, project: Path) -> dict[str, str]:
    """What differs from the live release.

    Args:
        inputs: What a release would be made of now.
        job: As it is now.
        live: What the live release keeps about itself.
        project: Absolute folder of the code.

    Returns:
        `code`, `data`, `config`, `environment` to how they differ, in some hundred characters; empty when nothing does.
    """
    recorded = live.document(LINEAGE).get("inputs", {})
    found: dict[str, str] = {}
    if code := _code_changes(inputs, job, live, project):
        found["code"] = code
    if (earlier := recorded.get("data")) is None:
        found["data"] = _SILENT
    elif earlier != inputs.data:
        found["data"] = _some([_data_changes(inputs, live) or f"fingerprint {earlier} → {inputs.data}"])
    if config := _config_changes(job, live):
        found["config"] = config
    before = packages_of(live)
    different = [
        name for name in sorted({*before, *inputs.environment}) if before.get(name) != inputs.environment.get(name)
    ]
    if different:
        said = [f"{name} {before.get(name, 'none')} → {inputs.environment.get(name, 'none')}" for name in different]
        found["environment"] = _some(said)
    return found


def _code_changes(inputs: Inputs, job: Job, live: ReleaseRecord, project: Path) -> str:
    """Of files, by name. A release that does not say which they were has a fingerprint of its source files."""
    before = recorded_files(live)
    if before is not None:
        return _some(differences(before, inputs.files, job, project))
    earlier = live.document(LINEAGE).get("inputs", {}).get("code")
    if earlier is None:
        return _SILENT
    said = [] if earlier == inputs.code else [f"fingerprint {earlier} → {inputs.code}"]
    return _some([*said, *(f"{pattern} was not looked at before" for pattern in inputs.files.named)])


def _data_changes(inputs: Inputs, live: ReleaseRecord) -> str:
    """By split, in samples; empty where one of both was not read."""
    said, known = [], live.document(DATA)
    for split, samples in inputs.samples.items():
        earlier = known.get(split, {}).get("samples")
        fingerprint = known.get(split, {}).get("fingerprint")
        if earlier is None or fingerprint is None:
            return ""
        if earlier != samples:
            said.append(f"{split} {earlier:,} → {samples:,} samples")
        elif fingerprint not in inputs.data.split():
            said.append(f"{split}: other samples, {samples:,} as before")
    return ", ".join(said)


def _config_changes(job: Job, live: ReleaseRecord) -> str:
    try:
        # With today's defaults, so that a key that is new in the application changes nothing.
        before = Job.from_record(live.document(JOB))
        there, here = flat(_config(before)), flat(_config(job))
    except (ReleaseError, ValueError):
        return "the live release's job cannot be read by this version"
    names = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
    return _some([f"{name} {there.get(name, 'none')} → {here.get(name, 'none')}" for name in names])


def _some(said: list[str]) -> str:
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    # Names and values are the live release's, whoever wrote them there.
    return ", ".join(on_one_line(text, LONGEST_TEXT) for text in said[:SHOWN]) + more

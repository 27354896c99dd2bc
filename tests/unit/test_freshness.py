"""Whether there is anything new to train on. No store: what a release tells of itself is given."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shipreader.records import FileEntry
from tests.support.projects import REPOSITORY, write_project
from train_and_ship.infra.provenance import code_fingerprint, environment_lock
from train_and_ship.registry.diff import ReleaseRecord
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import Inputs, changes, config_digest
from train_and_ship.registry.release.manifest import ENVIRONMENT, JOB, LINEAGE, Manifest


def inputs(job: Job, **other: Any) -> Inputs:
    known = Inputs(code="c1", data="d1 v1", config=config_digest(job), environment={"torch": "2.13.0", "numpy": "2.4"})
    return dataclasses.replace(known, **other)


def released(job: Job) -> ReleaseRecord:
    """A release made of these inputs."""
    lines = [f"{name}=={version}" for name, version in inputs(job).environment.items()]
    files = {
        JOB: json.dumps(job.model_dump(mode="json")),
        LINEAGE: json.dumps({"inputs": inputs(job).recorded()}),
        ENVIRONMENT: "\n".join(lines),
    }
    entries = {name: FileEntry(sha256="0" * 64, bytes=1) for name in files}
    manifest = Manifest(model=job.name, release="0" * 20, files=entries, formats={}, signature={}, metrics={})
    return ReleaseRecord(manifest=manifest, files=files)


def job(folder: Path, **parts: Any) -> Job:
    return load_job(write_project(folder, **parts))[0]


@pytest.mark.parametrize("example", ["digits", "own_loop", "lightning"])
def test_the_job_in_a_release_is_read_again_as_it_was(example: str) -> None:
    one, _ = load_job(REPOSITORY / "examples" / example / "job.yaml")
    assert Job.model_validate(json.loads(json.dumps(one.model_dump(mode="json")))) == one


def test_the_same_inputs_are_no_change(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert changes(inputs(one), one, released(one)) == {}


def test_each_input_that_changed_is_named_with_how(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    assert changes(inputs(one, code="c2"), one, live) == {"code": "fingerprint c1 → c2"}
    assert changes(inputs(one, data="d1 v2"), one, live) == {"data": "fingerprint d1 v1 → d1 v2"}
    newer = {"torch": "2.14.0", "scipy": "1.17"}
    assert changes(inputs(one, environment=newer), one, live) == {
        "environment": "numpy 2.4 → none, scipy none → 1.17, torch 2.13.0 → 2.14.0"
    }
    train = {"epochs": 3, "processes": 2, "batch_size": 32}
    other = job(tmp_path / "other", train=train)
    assert changes(inputs(other), other, live) == {"config": "train.epochs 2 → 3"}


def test_what_is_done_with_a_release_is_no_reason_to_train_another(tmp_path: Path) -> None:
    live = released(job(tmp_path))
    other = job(
        tmp_path / "other", gates={"accuracy": {"min": 0.5}}, release={"policy": "not_worse"}, retrain={"start": "live"}
    )
    assert changes(inputs(other), other, live) == {}


def test_keys_that_came_with_a_newer_version_of_the_application_change_nothing(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    old = json.loads(live.files[JOB])
    del old["retrain"], old["parity"], old["train"]["restarts"]
    aged = dataclasses.replace(live, files={**live.files, JOB: json.dumps(old)})
    assert changes(inputs(one), one, aged) == {}


def test_a_release_that_does_not_tell_is_trained_anew(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    silent = dataclasses.replace(live, files={**live.files, LINEAGE: "{}", JOB: "{}"})
    told = changes(inputs(one), one, silent)
    assert told["code"] == told["data"] == "the live release does not say what it was trained on"
    assert told["config"] == "the live release's job cannot be read by this version"


def test_code_is_every_source_file_of_the_project_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "inner" / "op.cpp").write_text("int x;")
    first = code_fingerprint(tmp_path)
    for noise in ("data.csv", ".hidden/a.py", "__pycache__/a.py", "venv/lib/a.py", "README.md"):
        path = tmp_path / noise
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("changed")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert code_fingerprint(tmp_path) == first
    (tmp_path / "inner" / "op.cpp").write_text("int y;")
    second = code_fingerprint(tmp_path)
    assert second != first
    (tmp_path / "inner" / "op.cpp").rename(tmp_path / "inner" / "new.cpp")
    assert code_fingerprint(tmp_path) not in (first, second)


def test_a_library_that_is_shipped_counts_as_code(tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"1")
    first = code_fingerprint(tmp_path, [library])
    library.write_bytes(b"2")
    assert code_fingerprint(tmp_path, [library]) != first


def test_the_environment_names_python_itself() -> None:
    version = subprocess.check_output([sys.executable, "-V"], text=True).split()[1]
    assert f"python=={version}" in environment_lock()


def test_what_a_package_brings_along_for_itself_is_no_part_of_the_environment() -> None:
    # In a process of its own: here something may have imported it already.
    code = (
        "from train_and_ship.infra.provenance import environment_lock; before = environment_lock()\n"
        "import sys, setuptools\n"
        "assert any('_vendor' in entry for entry in sys.path); print(before == environment_lock())"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
    assert said.strip() == "True"


@pytest.mark.parametrize("policy", ["better", "not_worse"])
def test_a_policy_without_a_metric_is_a_mistake_in_the_job_file(tmp_path: Path, policy: str) -> None:
    from train_and_ship.infra.errors import JobError

    with pytest.raises(JobError, match=rf"expected a metric in train.metrics with release.policy: {policy}"):
        job(tmp_path, train={"epochs": 1, "metrics": []}, release={"policy": policy})
    with pytest.raises(JobError, match=r"release.metric: something that is measured \(accuracy\), not f1"):
        job(tmp_path, release={"metric": "f1"})
    with pytest.raises(JobError, match="nothing is measured, so no candidate can be shown to be better"):
        job(tmp_path, train={"epochs": 1, "metrics": []}).unattended()

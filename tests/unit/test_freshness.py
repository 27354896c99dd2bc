"""Whether there is anything new to train on. No store: what a release tells of itself is given."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from shipreader.records import FileEntry
from tests.support.projects import REPOSITORY, write_project
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.infra.interpreter import our_interpreter
from train_and_ship.infra.provenance import code_files, code_fingerprint, environment_lock
from train_and_ship.registry.channels.decisions import KEPT
from train_and_ship.registry.diff import ReleaseRecord
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import Inputs, changes, config_digest, recorded_files
from train_and_ship.registry.made_of import DIGITS, Files
from train_and_ship.registry.release.manifest import DATA, ENVIRONMENT, JOB, LINEAGE, Manifest
from train_and_ship.tasks import decide


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


def test_what_has_changed_is_some_hundred_characters_whatever_the_live_release_says_of_itself(tmp_path: Path) -> None:
    one, absurd = job(tmp_path), "x" * 2_000_000 + "\ud800\n"
    live = released(one)
    files = dict(live.files)
    files[ENVIRONMENT] = f"{absurd}==1"
    files[JOB] = json.dumps({**json.loads(files[JOB]), "train": {"epochs": 1, "loss": absurd}})
    files[LINEAGE] = json.dumps({"inputs": {"code": absurd, "data": absurd}})
    found = changes(inputs(one), one, dataclasses.replace(live, files=files), tmp_path)
    assert found.keys() == {"code", "data", "config", "environment"}
    assert all(how.encode() and len(how) < 700 and how.isprintable() for how in found.values())
    assert found["data"] == f"fingerprint {'x' * 187}…"


@pytest.mark.parametrize("example", ["digits", "own_loop", "lightning"])
def test_the_job_in_a_release_is_read_again_as_it_was(example: str) -> None:
    one, _ = load_job(REPOSITORY / "examples" / example / "job.yaml")
    assert Job.from_record(json.loads(json.dumps(one.model_dump(mode="json")))) == one


def test_a_job_that_was_recorded_with_a_channel_that_may_not_be_made_any_more_is_read(tmp_path: Path) -> None:
    document = job(tmp_path).model_dump(mode="json")
    document["release"]["channel"] = "eu.west"
    before = Job.from_record(document)
    assert before.release.channel == before.unattended().release.channel == "eu.west"
    with pytest.raises(ValidationError, match="no dots, such as eu-west"):
        Job.model_validate(document)
    other = job(tmp_path / "other", train={"epochs": 3, "processes": 2, "batch_size": 32})
    assert changes(inputs(other), other, released(before), tmp_path) == {"config": "train.epochs 2 → 3"}


def test_the_same_inputs_are_no_change(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert changes(inputs(one), one, released(one), tmp_path) == {}


def test_each_input_that_changed_is_named_with_how(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    assert changes(inputs(one, code="c2"), one, live, tmp_path) == {"code": "fingerprint c1 → c2"}
    assert changes(inputs(one, data="d1 v2"), one, live, tmp_path) == {"data": "fingerprint d1 v1 → d1 v2"}
    newer = {"torch": "2.14.0", "scipy": "1.17"}
    assert changes(inputs(one, environment=newer), one, live, tmp_path) == {
        "environment": "numpy 2.4 → none, scipy none → 1.17, torch 2.13.0 → 2.14.0"
    }
    train = {"epochs": 3, "processes": 2, "batch_size": 32}
    other = job(tmp_path / "other", train=train)
    assert changes(inputs(other), other, live, tmp_path) == {"config": "train.epochs 2 → 3"}


def test_data_that_was_read_is_told_in_samples(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    splits = {"train": {"samples": 4500, "fingerprint": "d1"}, "validation": {"samples": 500, "fingerprint": "v1"}}
    live = dataclasses.replace(live, files={**live.files, DATA: json.dumps(splits)})
    more = inputs(one, data="d2 v1", samples={"train": 6750, "validation": 500})
    assert changes(more, one, live, tmp_path) == {"data": "train 4,500 → 6,750 samples"}
    other = inputs(one, data="d2 v2", samples={"train": 4500, "validation": 490})
    assert changes(other, one, live, tmp_path) == {
        "data": "train: other samples, 4,500 as before, validation 500 → 490 samples"
    }


def test_a_release_that_says_which_files_it_was_made_of_is_compared_by_them(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    files = Files(code={"plain.py": "1", "old.py": "2"}, opened={"config.json": "3"})
    lineage = {"inputs": inputs(one).recorded(), "files": dataclasses.asdict(files)}
    live = dataclasses.replace(live, files={**live.files, LINEAGE: json.dumps(lineage)})
    assert recorded_files(live) == files
    assert changes(inputs(one, code="other", files=files), one, live, tmp_path) == {}
    now = Files(code={"plain.py": "1", "mypkg/edge.py": "2"}, opened={"config.json": "4"})
    assert changes(inputs(one, files=now), one, live, tmp_path) == {
        "code": "mypkg/edge.py added, old.py removed, config.json changed"
    }


def test_what_is_done_with_a_release_is_no_reason_to_train_another(tmp_path: Path) -> None:
    live = released(job(tmp_path))
    other = job(
        tmp_path / "other", gates={"accuracy": {"min": 0.5}}, release={"policy": "not_worse"}, retrain={"start": "live"}
    )
    assert changes(inputs(other), other, live, tmp_path) == {}


def test_keys_that_came_with_a_newer_version_of_the_application_change_nothing(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    old = json.loads(live.files[JOB])
    del old["retrain"], old["parity"], old["train"]["restarts"]
    aged = dataclasses.replace(live, files={**live.files, JOB: json.dumps(old)})
    assert changes(inputs(one), one, aged, tmp_path) == {}


def test_a_release_that_does_not_tell_is_trained_anew(tmp_path: Path) -> None:
    one, live = job(tmp_path), released(job(tmp_path))
    silent = dataclasses.replace(live, files={**live.files, LINEAGE: "{}", JOB: "{}"})
    told = changes(inputs(one), one, silent, tmp_path)
    assert told["code"] == told["data"] == "the live release does not say what it was trained on"
    assert told["config"] == "the live release's job cannot be read by this version"


def test_code_is_every_source_file_of_the_project_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "inner" / "op.cpp").write_text("int x;")
    first = code_fingerprint(code_files(tmp_path))
    for noise in ("data.csv", ".hidden/a.py", "__pycache__/a.py", "venv/lib/a.py", "README.md"):
        path = tmp_path / noise
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("changed")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert code_fingerprint(code_files(tmp_path)) == first
    (tmp_path / "inner" / "op.cpp").write_text("int y;")
    second = code_fingerprint(code_files(tmp_path))
    assert second != first
    (tmp_path / "inner" / "op.cpp").rename(tmp_path / "inner" / "new.cpp")
    assert code_fingerprint(code_files(tmp_path)) not in (first, second)


def test_a_library_that_is_shipped_counts_as_code(tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"1")
    first = code_fingerprint(code_files(tmp_path, [library]))
    library.write_bytes(b"2")
    assert code_fingerprint(code_files(tmp_path, [library])) != first


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


# ---- what was tried before


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A candidate that was kept and reads a file that the live release did not: (now, its record)."""
    job, project = load_job(write_project(tmp_path / "project"))
    (project / "new.json").write_text("{}")
    sha = FileHashes(tmp_path, "").sha256(project / "new.json")[:DIGITS]
    records = {"live": made(released(job)), "candidate": made(released(job), opened={"new.json": sha})}
    known = inputs(job)
    kept = SimpleNamespace(
        decision=KEPT, inputs=known.digest(""), live="live", candidate="candidate", why="it is worse",
        decided_at="2026-01-01T00:00:00+00:00", flow_run="",
    )  # fmt: skip

    def read(_store: object, _model: str, release: str, sha256: str | None) -> ReleaseRecord:
        if release not in records:
            raise ReleaseError("gone")
        return records[release]

    monkeypatch.setattr(decide, "read_release_record", read)
    monkeypatch.setattr(decide, "read_decisions", lambda *_: [kept])
    monkeypatch.setattr(decide, "decided_at", lambda _: datetime(2026, 1, 1))
    channel = SimpleNamespace(store=None, model="plain", name="prod")
    settings = SimpleNamespace(home=tmp_path / "home")
    now = decide._Now(channel, settings, job, project, known, our_interpreter())  # type: ignore[arg-type]
    return now, records


def made(record: ReleaseRecord, **files: Any) -> ReleaseRecord:
    lineage = {**record.document(LINEAGE), "files": dataclasses.asdict(Files(**files))}
    return dataclasses.replace(record, files={**record.files, LINEAGE: json.dumps(lineage)})


def reason(now: Any) -> str:
    live = SimpleNamespace(release="live")
    return decide._reason_to_skip(now, live, {"code": "plain.py changed"}, now.inputs.digest(""))  # type: ignore[arg-type]


def test_what_was_tried_in_vain_is_tried_again_when_a_file_changed_that_only_the_candidate_reads(tried: Any) -> None:
    now, _ = tried
    assert "(release candidate), and release live stayed: it is worse" in reason(now)
    (now.project / "new.json").write_text("[]")
    assert reason(now) == ""


def test_a_candidate_that_is_gone_was_tried_all_the_same(tried: Any) -> None:
    now, records = tried
    del records["candidate"]
    (now.project / "new.json").write_text("[]")
    assert "stayed: it is worse" in reason(now)

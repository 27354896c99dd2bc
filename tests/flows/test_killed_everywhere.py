"""A flow that is killed in the middle of every stage, and between any two, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fixture_types import Command
from tests.support.flow_runs import STAGES
from tests.support.html_pages import checked
from tests.support.processes import PATIENCE
from tests.support.projects import REPOSITORY, SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.rundir import MANIFEST
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import read_manifest
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.tracking.connection import connect

MIDDLE = {stage: "checkpoints/step-????????" if stage == "train" else f"{stage}.work/*" for stage in STAGES}
END = {stage: f"{stage}/{MANIFEST}" for stage in STAGES}
EVERYWHERE = [moment for stage in STAGES for moment in (MIDDLE[stage], END[stage])]


def killed(job: Path, resume: str, moment: Callable[[], object]) -> None:
    """Run the flow until something is there, then kill its process."""
    argv = [Path(sys.executable).with_name("ship"), "run", str(job), *(["--resume", resume] if resume else [])]
    flow = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert flow.stderr is not None
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert flow.poll() is None, flow.stderr.read()
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.005)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()


# `test_resume.py` kills at one moment.
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_flow_killed_in_and_after_every_stage_ends_with_the_same_release_and_repeats_no_complete_stage(
    command: Command, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    whole, harassed = "whole", "harassed"

    def job_of(name: str) -> Path:
        train = {"epochs": 2, "processes": 2, "batch_size": 32, "checkpoint": {"steps": 1}}
        formats = {"formats": ["torchscript", "onnx"]}
        # In one folder: TorchScript holds the path of its source.
        job = write_project(tmp_path, extra=SLOW, name=name, train=train, export=formats)
        return job.rename(tmp_path / f"{name}.yaml")

    def files_of(name: str) -> dict[str, str]:
        """What is live: the files that do not say when and where it was made."""
        pointer = read_pointer(Channel(store, name, "prod"))
        assert pointer is not None
        told = ("lineage.json", "verdicts.json", "job.json")
        files = read_manifest(store, name, pointer.release).files
        return {file: entry.sha256 for file, entry in files.items() if file not in told}

    undisturbed = command("ship", "run", str(job_of(whole)))
    assert undisturbed.status == 0, undisturbed.text

    job, runs = job_of(harassed), stack.runs / harassed

    def run() -> Path | None:
        return next((path for path in runs.glob("*-*") if path.is_dir()), None)

    def appears(pattern: str) -> Callable[[], object]:
        return lambda: (folder := run()) is not None and any(folder.glob(pattern))

    killed(job, "", lambda: run() is not None)
    (folder,) = (path for path in runs.glob("*-*") if path.is_dir())

    def written() -> dict[str, int]:
        """When each complete stage was completed."""
        manifests = {name: folder / name / MANIFEST for name in STAGES}
        return {name: path.stat().st_mtime_ns for name, path in manifests.items() if path.exists()}

    def live_pointer() -> Pointer | None:
        return read_pointer(Channel(store, harassed, "prod"))

    complete: dict[str, int] = {}
    for moment in EVERYWHERE:
        killed(job, folder.name, appears(moment))
        complete = {**written(), **complete}
    # Between the pointer and the report, which comes last.
    assert live_pointer() is None
    killed(job, folder.name, live_pointer)
    complete = {**written(), **complete}
    assert written() == complete and set(complete) == set(STAGES)

    ended = command("ship", "run", str(job), "--resume", folder.name)
    assert ended.status == 0, ended.text
    for stage in ("train", "export", "validate"):
        assert f"{stage}: already complete in this run, verified by hash" in ended.text
    # Beside what is live now it is rehearsed again.
    assert {**written(), "rehearse": 0} == {**complete, "rehearse": 0}
    assert files_of(harassed) == files_of(whole)
    live = live_pointer()
    assert live is not None and live.generation == 1
    # What complete stages took is counted, what was killed is named.
    report = checked((folder / "report.html").read_text())
    assert re.search(r"Killed before their end, and not counted: .*train \(\d\)", report.text)
    client = connect(stack.mlflow_url)
    assert [version.version for version in client.search_model_versions(f"name='{harassed}'")] == ["1"]
    (mlflow_run,) = client.search_runs(
        [client.get_experiment_by_name(harassed).experiment_id], "attributes.status = 'FINISHED'"
    )
    assert json.loads((folder / "release" / "files" / "lineage.json").read_text())["flow_run_id"] == folder.name
    assert mlflow_run.data.tags["flow_run_id"] == folder.name

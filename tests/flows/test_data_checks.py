"""Bad data stops a run before training, and says what is wrong with it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.flow_runs import flow_run_of, read_run
from tests.support.html_pages import checked
from tests.support.projects import CODE, write_project
from tests.support.retraining import POOR, Project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.decisions import FAILED
from train_and_ship.registry.data.snapshots import publish_snapshot, take
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.release.manifest import LINEAGE

CHECKED: dict[str, Any] = {
    "factory": "plain:build_dataset",
    "checks": {
        "tensors": {"input": {"dtype": "float32", "shape": [4], "min": -10, "max": 10}},
        "labels": {"allowed": [0, 1, 2]},
        "drift": {"psi": 0.5},
    },
}


def test_corrupt_data_is_refused_before_training_and_names_each_fault(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    extra = """
        build_sound = build_dataset
        def build_dataset(split):
            inputs, target = build_sound(split).tensors
            if split == "train":
                inputs[3, 0], inputs[5, 1] = float("nan"), 99.0
            else:
                inputs[:2] = build_dataset("train").tensors[0][:2]
            return TensorDataset(inputs, target)
    """
    sound = ship("check", str(write_project(tmp_path / "sound", name="sound", train=POOR, data=CHECKED)), "--no-export")
    assert sound.status == 0 and "passes 16 checks; drift is asked when a run begins" in sound.output, sound.text
    job = write_project(tmp_path / "corrupt", extra=extra, name="corrupt", train=POOR, data=CHECKED)
    checked = ship("check", str(job), "--no-export")
    assert checked.status == 2 and "Traceback" not in checked.text, checked.text
    ended = ship("run", str(job))
    assert ended.status == 2, ended.text
    assert "the data is not what data.checks asks for" in ended.errors and "Nothing was trained" in ended.errors
    assert "missing of train input: 1 of 384 (0.26%), expected at most 0.00%" in ended.errors
    assert "outside of train input: 1 of 384 (0.26%)" in ended.errors
    assert "outside of train input: 1 of 384 (0.26%)" in checked.errors
    assert "overlap of validation samples in the training data: 2 of 96 (2.08%)" in ended.errors
    assert "training on" not in ended.text and "Traceback" not in ended.text
    assert live(store, "corrupt") is None


def test_held_out_data_that_is_training_data_does_not_go_live(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    """Of one whose factory ignores the split, however it is drawn, and of one with a few samples in both."""
    extra = """
        build_apart = build_dataset
        def build_dataset(split):
            inputs, target = build_apart("train").tensors
            order = torch.randperm(96, generator=torch.Generator().manual_seed(1 if split == "train" else 2))
            return TensorDataset(inputs[order], target[order])
        def build_some(split):
            inputs, target = build_apart(split).tensors
            if split == "validation":
                inputs[:2] = build_apart("train").tensors[0][:2]
            return TensorDataset(inputs, target)
    """
    more = {"extra": extra, "train": POOR, "export": {"formats": ["torchscript"]}}
    ended = ship("run", str(write_project(tmp_path / "same", name="same", **more)))
    assert ended.status == 2 and "Traceback" not in ended.text, ended.text
    assert "96 of 96 validation samples (100.0%) are training samples, bit by bit: no number" in ended.errors
    assert live(store, "same") is None
    told = "2 of 96 validation samples (2.1%) are training samples, bit by bit"
    some = write_project(tmp_path / "some", name="some", data={"factory": "plain:build_some"}, **more)
    ended = ship("run", str(some))
    assert ended.status == 0 and told in ended.text, ended.text
    assert told in checked((stack.runs / "some" / flow_run_of(ended) / "report.html").read_text()).text
    assert MlflowClient(stack.mlflow_url).get_model_version("some", "1").tags["data.overlap"] == told


# What drift is, and its limit: unit/test_data_checks.py.
@pytest.mark.soak
def test_drift_from_the_live_releases_data_fails_the_night_with_both_distributions(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    project = Project(tmp_path, store, "drifting")
    first = project.retrain(train=POOR, data=CHECKED)
    assert first.name == "Promoted", first.message
    before = project.live
    # New samples of the same distribution are new data, and no drift.
    fresh = CODE.replace("manual_seed(0 if", "manual_seed(5 if")
    assert project.retrain(train=POOR, code=fresh, data=CHECKED).name in ("Promoted", "Kept")
    live_now = project.live.release
    moved = fresh.replace(
        "torch.randn(size, 4, generator=generator)", "torch.randn(size, 4, generator=generator) + 1.5"
    )
    state = project.retrain(train=POOR, code=moved, data=CHECKED)
    assert state.is_failed() and "psi of input[0]: " in str(state.message), state.message
    decision = project.decisions()[-1]
    assert decision.decision == FAILED and "expected at most 0.5" in decision.why
    assert project.live.release == live_now and project.live.generation <= before.generation + 1
    _, artifacts = read_run(decision.flow_run)
    (page,) = [str(artifact.data) for artifact in artifacts if artifact.key == "data-drifting"]
    assert f"Beside the data of the live release {live_now}" in page and "█" in page
    report = checked((stack.runs / "drifting" / decision.flow_run / "report.html").read_text())
    assert "drifting: refused" in report.text and f"Beside the data of the live release {live_now}" in report.text
    assert report.headings[:2] == ["Decision", "Data"] and report.charts >= 4


# Fetching, verifying and knowing it are asked in services/test_snapshots.py.
@pytest.mark.soak
def test_data_in_a_bucket_is_verified_given_to_the_factory_and_known_without_being_read(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    code = CODE.replace("def build_dataset(split):", "def build_drawn(split):") + textwrap.dedent("""
        def build_dataset(split, snapshot):
            from safetensors.torch import load_file
            found = load_file(f"{snapshot}/{split}.safetensors")
            return TensorDataset(found["inputs"], found["target"])
    """)
    data = tmp_path / "data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        inputs = torch.randn(96, 4, generator=generator)
        save_file({"inputs": inputs, "target": (inputs[:, 0] > 0).long()}, data / f"{split}.safetensors")
    prefix = "data/kept/"
    publish_snapshot(data, take(data), store, prefix)
    kept = {"factory": "plain:build_dataset", "snapshot": {"path": f"s3://{store.bucket}/{prefix}"}}
    project = Project(tmp_path / "project", store, "snapped")

    assert project.retrain(train=POOR, code=code, data=kept).name == "Promoted"
    inputs_of_live = read_release_record(store, "snapped", project.live.release).document(LINEAGE)["inputs"]
    assert inputs_of_live["data"] == f"snapshot {take(data).sha256}"

    assert project.retrain(train=POOR, code=code, data=kept).name == "Skipped"
    (data / "more.txt").write_text("new")
    publish_snapshot(data, take(data), store, prefix)
    state = project.retrain(train=POOR, code=code, data=kept)
    assert state.name in ("Promoted", "Kept"), state.message
    assert set(project.decisions()[-1].changed) == {"data"}

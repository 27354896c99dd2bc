"""A release with an AOTInductor package, through the whole flow and the C++ program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from torchworker.stages import cpp
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer


@pytest.mark.soak
def test_a_compiled_release_is_proven_without_python_and_promoted(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    if cpp.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    job = write_project(
        tmp_path / "project",
        name="compiled",
        train={"epochs": 5, "processes": 1, "batch_size": 32},
        export={"formats": ["aoti"], "batch": 8},
        parity={"cpp": "required"},
        gates={"accuracy": {"min": 0.3}},
    )
    ended = ship("run", str(job))
    assert ended.status == 0, ended.text
    pointer = read_pointer(Channel(store, "compiled", "prod"))
    assert pointer is not None
    release = tmp_path / "release"
    assert fetch_release(store, "compiled", pointer.release, release).formats == {"aoti": "model.aoti.pt2"}

    verdicts = json.loads((release / "verdicts.json").read_text())["verdicts"]
    in_cpp = [item for item in verdicts if item["format"] == "aoti in C++"]
    assert [item["case"] for item in in_cpp] == [
        "batch 1", "batch 8", "batch 17", "28 probes", "called again", "96 samples",
    ]  # fmt: skip
    assert all(item["ran"] and item["passed"] for item in in_cpp)
    # What the Python runtime is asked, the C++ program is asked too.
    in_python = [item["case"] for item in verdicts if item["format"] == "aoti" and item["gate"] == "parity"]
    assert in_python == [*(item["case"] for item in in_cpp), "predictions"]
    version = MlflowClient(stack.mlflow_url).get_model_version_by_alias("compiled", "champion")
    assert "aoti in C++" in str(version.description)

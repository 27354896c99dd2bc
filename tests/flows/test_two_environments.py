"""The code of a job in an environment of its own, artifacts proven in ours: a whole run, and what its release says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from tests.support.second_environment import EXPORTS, make_environment
from torchworker.stages import cpp
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.newest_run import run_of

THEIRS = """
    import theirs, importlib.util
    for name in ("prefect", "mlflow", "pydantic", "train_and_ship", "shipreader"):
        assert importlib.util.find_spec(name) is None, name
    def build_model():
        return nn.Linear(4, theirs.CLASSES)
"""
"""Runs where `theirs` is installed and ours are not."""
TRAIN = {"epochs": 1, "processes": 1, "batch_size": 32}


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with torchworker, and a package of the user's that ours has not."""
    python = make_environment(tmp_path_factory.mktemp("second") / "environment", EXPORTS)
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    (site / "theirs.py").write_text("CLASSES = 3\n")
    (site / "theirs-4.2.dist-info").mkdir()
    (site / "theirs-4.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 4.2\n")
    return python


def released(ship: Ship, store: ObjectStore, job: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Lineage and packages of what a run of the job made live."""
    ended = ship("run", str(job))
    assert ended.status == 0, ended.text
    name = load_job(job)[0].name
    pointer = read_pointer(Channel(store, name, "prod"))
    assert pointer is not None
    fetch_release(store, name, pointer.release, folder)
    return json.loads((folder / "lineage.json").read_text()), (folder / "environment.txt").read_text().split()


def test_a_run_trains_in_the_projects_environment_and_proves_in_ours(
    ship: Ship, store: ObjectStore, second: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    exports = {"formats": ["torchscript"], "serve": "none"}
    job = write_project(project, name="apart", extra=THEIRS, train=TRAIN, export=exports, parity={"cpp": "off"})
    assert "No module named 'theirs'" in ship("check", str(job), "--no-export").text
    # As an environment beside a job is found: by nobody's naming it.
    (project / ".venv").symlink_to(second.parent.parent)
    lineage, packages = released(ship, store, job, tmp_path / "release")
    made, proven = (lineage["environments"][name] for name in ("made", "proven"))
    assert made["torch"] == proven["torch"] and lineage["environments"]["where_made"] == []
    assert "theirs==4.2" in packages and not any(
        line.startswith(("prefect==", "train-and-ship==")) for line in packages
    )


@pytest.mark.soak
def test_what_only_loads_where_it_was_made_is_proven_there_and_the_release_says_so(
    ship: Ship, store: ObjectStore, stack: Settings, second: Path, tmp_path: Path
) -> None:
    if cpp.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    job = write_project(
        tmp_path / "project", name="compiled-apart", extra=THEIRS, train=TRAIN, python=str(second),
        export={"formats": ["onnx", "aoti"], "batch": 8}, parity={"cpp": "required"}, gates={"accuracy": {"min": 0.1}},
    )  # fmt: skip
    lineage, _ = released(ship, store, job, tmp_path / "release")
    assert lineage["environments"]["where_made"] == ["aoti"]
    run = run_of(stack, "compiled-apart")
    asked = [json.loads((run / "validate" / place / "request.json").read_text()) for place in ("", "where-made")]
    assert [list(request["formats"]) for request in asked] == [["onnx"], ["aoti"]]
    assert [request["cpp"] for request in asked] == ["off", "required"]
    verdicts = json.loads((tmp_path / "release/verdicts.json").read_text())["verdicts"]
    assert {item["format"] for item in verdicts if item["passed"]} >= {"onnx", "aoti", "aoti in C++"}
    assert all(item["passed"] for item in verdicts if item["ran"])
    assert "aoti where made, because they load nowhere else" in (run / "report.md").read_text()

"""Gates on a metric that only the user's code knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import read_manifest
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.release.manifest import VERDICTS

RECALL = """
    def recall(outputs, target, of):
        hits = (outputs.argmax(1) == of) & (target == of)
        return hits.sum() / (target == of).sum()
    def always(outputs, target):
        raise LookupError("no table of classes")
"""


def job(folder: Path, name: str, factory: str, gate: dict[str, float], **args: Any) -> str:
    metric = {"factory": f"plain:{factory}", "args": args, "better": "higher", "name": "recall_of_2"}
    return str(
        write_project(
            folder,
            extra=RECALL,
            name=name,
            train={"epochs": 3, "processes": 1, "batch_size": 16, "learning_rate": 0.05, "metrics": [metric]},
            export={"formats": ["torchscript", "onnx"]},
            gates={"recall_of_2": gate},
        )
    )


# Its value on an artifact is asked in exports/test_score.py.
@pytest.mark.soak
def test_a_metric_in_user_code_is_gated_on_each_artifact_and_recorded(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    path = job(tmp_path, "recalled", "recall", {"min": 0.0, "vs_live": -1.0}, of=2)
    for _ in range(2):
        ended = ship("run", path)
        assert ended.status == 0, ended.text
    pointer = read_pointer(Channel(store, "recalled", "prod"))
    assert pointer is not None and pointer.generation in (1, 2)
    verdicts = read_release_record(store, "recalled", pointer.release).document(VERDICTS)["verdicts"]
    assert {item["format"] for item in verdicts if item["gate"] == "recall_of_2"} == {"torchscript", "onnx"}
    assert 0 <= read_manifest(store, "recalled", pointer.release).metrics["recall_of_2"] <= 1


def test_a_metric_that_fails_or_falls_short_stops_the_run(ship: Ship, store: ObjectStore, tmp_path: Path) -> None:
    short = ship("run", job(tmp_path / "short", "short", "recall", {"min": 1.5}, of=2))
    assert short.status == 2 and "recall_of_2" in short.errors and "FAILED" in short.errors, short.text
    assert live(store, "short") is None

    broken = ship("check", job(tmp_path / "broken", "broken", "always", {"min": 0.1}))
    assert broken.status == 2, broken.text
    assert "no table of classes" in broken.errors and "Traceback" not in broken.errors

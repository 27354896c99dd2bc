"""A model that overfits goes live as it was at its best, and everything that is told of the run says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.settings import Settings

CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def build_model():
    return nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


def build_dataset(split):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    inputs = torch.randn(200 if split == "train" else 1000, 20, generator=generator)
    noise = 1.2 * torch.randn(len(inputs), generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] + noise > 0).long())


def surprise(outputs, target):
    return nn.functional.cross_entropy(outputs, target)
"""


@pytest.mark.soak
def test_a_model_that_overfits_at_once_ships_as_it_was_at_its_best(ship: Ship, stack: Settings, tmp_path: Path) -> None:
    job_file = write_project(
        tmp_path,
        CODE,
        name="overfits",
        train={
            "epochs": 60,
            "batch_size": 20,
            "learning_rate": 0.003,
            "early_stopping": 10,
            "metrics": [{"factory": "plain:surprise", "better": "lower"}, "accuracy"],
        },
        export={"formats": ["torchscript"], "serve": "none"},
    )
    ended = ship("run", str(job_file))
    assert ended.status == 0, ended.text
    (run,) = (stack.runs / "overfits").glob("*-*")
    lineage = json.loads((run / "release/files/lineage.json").read_text())
    losses = [row["validation_loss"] for row in lineage["history"]]
    best = losses.index(min(losses)) + 1
    assert (lineage["shipped_epoch"], lineage["chosen_by"]) == (best, "validation_surprise")
    assert len(losses) == best + 10 and losses[-1] > 2 * min(losses)

    words = f"epoch {best} of {len(losses)}: validation_surprise {min(losses):.4g} is the best. It was chosen on"
    assert f"ships: {words}" in ended.text
    client = MlflowClient(stack.mlflow_url)
    (version,) = client.search_model_versions("name = 'overfits'")
    assert version.tags["shipped.epoch"] == str(best) and version.tags["shipped.why"].startswith(words)
    assert words in version.description
    told = client.get_run(version.run_id).data
    assert told.params["train.weights"] == "best"
    assert told.metrics["shipped.validation_loss"] == pytest.approx(min(losses))
    # What the gates measured is the epoch that is said to ship.
    accuracy = lineage["history"][best - 1]["validation_accuracy"]
    assert told.metrics["torchscript.accuracy"] == pytest.approx(accuracy, abs=2e-3)
    assert told.metrics["torchscript.surprise"] == pytest.approx(min(losses), rel=1e-4)

"""What training can be told beside its loss goes live like anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import read_manifest

DRAWN = """
    def weights(dataset):
        labels = dataset.tensors[1]
        return 1 / torch.bincount(labels)[labels]
    def build_optimizer(model, parameters, lr):
        assert isinstance(model, nn.Module) and len(parameters) == 2
        return torch.optim.AdamW(parameters, lr=lr)
"""


@pytest.mark.soak
def test_a_partly_frozen_model_trained_on_drawn_samples_is_gated_by_a_metric_of_torchmetrics(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    path = write_project(
        tmp_path,
        extra=DRAWN,
        name="told",
        data={"factory": "plain:build_dataset", "args": {"size": 98}, "sampler": "plain:weights"},
        train={
            "epochs": 3,
            "processes": 2,
            "batch_size": 16,
            "freeze": ["0.*"],
            "optimizer": {"factory": "plain:build_optimizer"},
            "groups": [{"names": ["*.bias"], "weight_decay": 0}],
            "schedule": "warmup_cosine",
            "learning_rate": 0.05,
            "drop_last": True,
            "metrics": ["f1_score", "accuracy"],
        },
        export={"formats": ["torchscript", "onnx"], "serve": "none"},
        gates={"f1_score": {"min": 0.05, "vs_live": -1.0}},
    )
    for _ in range(2):
        ended = ship("run", str(path))
        assert ended.status == 0, ended.text
    pointer = live(store, "told")
    assert pointer is not None and pointer[0] in (1, 2)
    manifest = read_manifest(store, "told", pointer[1])
    assert 0.05 < manifest.metrics["f1_score"] <= 1
    run = next((stack.runs / "told").glob("*-*"))
    history = json.loads((run / "release/files/lineage.json").read_text())["history"]
    assert history[-1]["validation_f1_score"] == pytest.approx(manifest.metrics["f1_score"], abs=1e-2)
    (version, *_) = MlflowClient(stack.mlflow_url).search_model_versions("name = 'told'")
    told = MlflowClient(stack.mlflow_url).get_run(version.run_id).data.params
    assert told["train.freeze"] == "['0.*']" and told["train.schedule"] == "warmup_cosine"

"""What a server needs besides tensors goes the whole way: from the job to the bucket, to a reader and to MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient, pyfunc

from shipreader import inference_model
from shipreader.reader import Reader
from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings

pytestmark = pytest.mark.soak
WRITES = """
import json

def write_extras(folder, model):
    (folder / "layers.json").write_text(json.dumps([type(part).__name__ for part in model]))
"""
JOB: dict[str, Any] = {
    "name": "shipping",
    "model": {"factory": "plain:build_model", "args": {"width": 64}},
    "train": {"epochs": 1, "processes": 1, "batch_size": 32},
    "parity": {"cpp": "off"},
    "release": {"policy": "always"},
}
EXPORT = {
    "formats": ["onnx"],
    "serve": "none",
    "files": ["tokenizer/"],
    "extras": "plain:write_extras",
    "external_data": "always",
}


def test_files_and_labels_reach_readers_and_mlflow_and_other_labels_are_of_another_kind(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    project, labels = tmp_path / "project", ["low", "middle", "high"]
    (project / "tokenizer").mkdir(parents=True)
    (project / "tokenizer" / "словарь 1.txt").write_text("a")

    def job(**export: Any) -> str:
        return str(write_project(project, extra=WRITES, export={**EXPORT, **export}, **JOB))

    missing = ship("run", job(files=["tokenizer/", "prices.csv"]))
    assert missing.status == 2 and "prices.csv, found none" in missing.text and "Traceback" not in missing.text
    few = ship("run", job(labels=labels[:2]))
    assert few.status == 2 and "expected 3 texts, one for each column" in few.text, few.text
    checked = ship("check", job(labels=labels), COLUMNS="200")
    assert checked.status == 0, checked.text
    assert "tokenizer, what plain:write_extras writes" in checked.output and "low, middle, high" in checked.output

    ended = ship("run", job(labels=labels))
    assert ended.status == 0, ended.text
    client = s3_client(Settings.load())
    release = Reader("shipping", bucket=store.bucket, folder=tmp_path / "pulled", client=client).pull()
    assert (release.file("tokenizer") / "словарь 1.txt").read_text() == "a"
    assert json.loads(release.file("layers.json").read_text()) == ["Linear", "ReLU", "Linear"]
    assert release.manifest.signature["labels"] == labels
    assert "model.onnx.data" in release.manifest.files and "onnx" in release.manifest.formats
    assert inference_model.session(str(release.artifact("onnx")), spin=False).get_outputs()

    mlflow = MlflowClient(stack.mlflow_url)
    (version,) = mlflow.search_model_versions("name = 'shipping'")
    hashes = json.loads(version.tags["sha256"])
    assert {"model.onnx", "model.onnx.data", "files"} <= hashes.keys() and "files/layers.json" not in hashes
    fetched = _model(stack, tmp_path)
    assert (fetched / "files" / "tokenizer" / "словарь 1.txt").read_text() == "a"
    assert "- middle" in (fetched / "MLmodel").read_text()
    assert pyfunc.load_model(str(fetched)).predict(np.zeros((2, 4), np.float32))["output"].shape == (2, 3)

    other = ship("run", job(labels=["low", "high", "middle"]))
    assert other.status == 2 and "labels: class 1: middle of 3 → high of 3" in other.text, other.text


def _model(stack: Settings, folder: Path) -> Path:
    """The files of the one version, from MLflow."""
    import mlflow

    mlflow.set_tracking_uri(stack.mlflow_url)
    return Path(mlflow.artifacts.download_artifacts("models:/shipping/1", dst_path=str(folder / "fetched")))

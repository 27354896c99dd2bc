"""int8 variants through the whole flow: what holds its promises is released, what does not stays out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer

DYNAMIC, STATIC = "onnx-int8-dynamic", "onnx-int8-static"
# The dynamic variant reaches 43 dB on this model, the static one, which rounds activations too, 36.
LIMITS = {"sqnr_db": 40, "agreement": 0.9, "flip_margin": 5, "metric_loss": 0.1, "speedup": 0.001}


def job(folder: Path, **export: Any) -> Path:
    return write_project(
        folder,
        name="eighth",
        model={"factory": "plain:build_model", "args": {"width": 64}},
        train={"epochs": 20, "processes": 1, "batch_size": 32, "learning_rate": 0.02},
        export={"formats": ["onnx"], "quantize": LIMITS, **export},
    )


@pytest.mark.soak
def test_a_variant_that_holds_its_promises_is_released_and_one_that_does_not_is_left_out_with_the_reason(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    ended = ship("run", str(job(tmp_path / "project")))
    assert ended.status == 0, ended.text
    assert re.search(rf"{STATIC} is not in the release: SQNR 3\d\.\d dB, expected at least 40", ended.text)
    # Two batches of capture and a larger one, and the variant once on all of them.
    assert "rehearsed from the bucket: 6 checks passed" in ended.text
    pointer = read_pointer(Channel(store, "eighth", "prod"))
    assert pointer is not None
    manifest = fetch_release(store, "eighth", pointer.release, tmp_path / "release")
    assert manifest.formats == {"onnx": "model.onnx", DYNAMIC: "model.int8-dynamic.onnx"}
    assert not (tmp_path / "release" / "model.int8-static.onnx").exists()
    verdicts = json.loads((tmp_path / "release" / "verdicts.json").read_text())
    assert verdicts["int8"][STATIC]["reason"] and not verdicts["int8"][DYNAMIC]["reason"]
    assert set(verdicts["int8"][DYNAMIC]["speedups"]) == {"1", "8", "64"}
    described = MlflowClient(stack.mlflow_url).get_model_version_by_alias("eighth", "champion").description or ""
    assert "### int8" in described and "left out: SQNR" in described


# A variant that is not good enough is asked in exports/test_int8.py.
@pytest.mark.soak
def test_a_variant_that_the_job_wants_to_serve_with_and_that_is_not_good_enough_stops_the_run(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    before = live(store, "eighth")
    ended = ship("run", str(job(tmp_path, serve=STATIC)))
    assert ended.status == 2, ended.text
    assert re.search(rf"export\.serve: {STATIC} is not in the release: SQNR", ended.errors)
    assert "Nothing was registered or promoted" in ended.errors and "Traceback" not in ended.text
    assert live(store, "eighth") == before

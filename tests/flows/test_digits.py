"""The digits example, shipped once by `ship run`, and what every place then holds."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from tests.support.channels import live
from tests.support.fixture_types import Command, Ship
from tests.support.flow_runs import flow_run_of, read_run
from tests.support.html_pages import checked
from tests.support.processes import Ended, orphans
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.cost import FLOW, read_costs


def test_a_person_sees_progress_with_a_rate_and_an_eta(digits: Ended) -> None:
    epochs = re.findall(r"epoch (\d+)/12  loss .* accuracy .* samples/s  ETA \d+ s", digits.text)
    assert epochs == [str(number) for number in range(1, 13)]
    for kind in ("torchscript", "onnx", "pt2"):
        assert re.search(rf"'export' - {kind}: .* in \d+\.\d s", digits.text), kind
        assert re.search(rf"'validate' - {kind}: held against the model in \d+\.\d s", digits.text), kind
    # The table of all gates is in the report.
    assert "<= 1    passed" not in digits.text and "gates passed" in digits.text


def test_the_release_is_live_complete_and_holds_every_format(digits: Ended, store: ObjectStore, tmp_path: Path) -> None:
    pointer = read_pointer(Channel(store, "digits", "prod"))
    assert pointer is not None
    assert f"digits release {pointer.release} is live on prod" in digits.output
    assert f"s3://models/models/digits/releases/{pointer.release}/" in digits.output
    fetch_release(store, "digits", pointer.release, tmp_path / "release")

    names = {path.name for path in (tmp_path / "release").iterdir()}
    assert {
        "MANIFEST.json", "model.onnx", "model.pt2", "model.torchscript", "weights.safetensors", "golden.safetensors",
        "job.json", "verdicts.json", "lineage.json", "data.json", "environment.txt",
    } == names  # fmt: skip
    manifest = json.loads((tmp_path / "release" / "MANIFEST.json").read_text())
    assert manifest["metrics"]["accuracy"] >= 0.97
    assert set(manifest["serve"]) == {"latency", "throughput"}
    assert set(manifest["serve"].values()) <= set(manifest["formats"])
    assert manifest["signature"]["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]


def test_mlflow_shows_one_version_with_files_curves_data_and_tags(digits: Ended, stack: Settings) -> None:
    client = MlflowClient(stack.mlflow_url)
    version = client.get_model_version_by_alias("digits", "champion")
    run = client.get_run(version.run_id)

    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "12"
    assert len(client.get_metric_history(version.run_id, "validation_accuracy")) == 12
    assert len(client.get_metric_history(version.run_id, "ranks/step_seconds_1")) == 12
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert version.tags["flow_run_id"] == flow_run_of(digits)
    assert len(json.loads(version.tags["sha256"])["model.onnx"]) == 64
    assert version.tags["decision_why"].startswith("prod: All gates")
    assert version.tags["serve.latency"] in ("onnx", "pt2", "torchscript")
    for kind in ("onnx", "pt2", "torchscript"):
        assert {f"{kind}.{name}" for name in ("load_ms", "size_mb", "memory_mb")} <= run.data.metrics.keys()
        assert {f"{kind}.samples_per_second.batch_{size}" for size in (1, 8, 64)} <= run.data.metrics.keys()
    first, *rest = (version.description or "").splitlines()
    passed = r"(all 33 gates passed|all 27 gates passed, not run: torchscript in C\+\+ without Python)"
    assert re.fullmatch(rf"accuracy 0\.9\d+, {passed}: digits \w+ as onnx, pt2, torchscript\.", first)
    assert any("parity" in line.lower() for line in rest)


def test_pyfunc_loads_the_champion_and_predicts_what_eager_did(
    digits: Ended, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    pointer = read_pointer(Channel(store, "digits", "prod"))
    assert pointer is not None
    fetch_release(store, "digits", pointer.release, tmp_path / "release")
    golden = load_file(tmp_path / "release" / "golden.safetensors")
    mlflow.set_tracking_uri(stack.mlflow_url)
    outputs: Any = mlflow.pyfunc.load_model("models:/digits@champion").predict(
        {"image": golden["batch_64.input.image"]}
    )

    np.testing.assert_allclose(outputs["output"], golden["batch_64.eager.output"], rtol=1e-4, atol=1e-4)


def test_the_run_page_has_progress_and_one_report_with_links(digits: Ended, stack: Settings) -> None:
    run, artifacts = read_run(flow_run_of(digits))
    assert run.state is not None and run.state.is_completed()
    by_type = {artifact.type: artifact for artifact in artifacts}

    assert set(by_type) == {"progress", "markdown"}
    assert by_type["progress"].data == 100.0
    # An address that is no link is written so that nobody makes one of it.
    report = html.unescape(str(by_type["markdown"].data))
    for part in ("What was trained", "Parity", "Gates", "Speed", "Learning curves", stack.mlflow_url, "s3://models/"):
        assert part in report


def test_the_whole_report_is_one_file_in_the_runs_folder_in_mlflow_and_beside_the_release(
    digits: Ended, stack: Settings, store: ObjectStore
) -> None:
    path = Path(re.search(r"report +(\S+/report\.html)", digits.output)[1])  # type: ignore[index]
    report = checked(path.read_text())
    assert [title.split(" the live")[0] for title in report.headings] == [
        "Decision", "Beside", "Speed", "Parity", "Gates and metrics", "Learning curves", "Data", "Cost",
        "What was trained", "Lineage",
    ]  # fmt: skip
    # Speed at two batches, two of parity, loss, accuracy, rate and seconds, labels and columns, seconds by stage.
    assert report.charts >= 10
    pointer = read_pointer(Channel(store, "digits", "prod"))
    version = MlflowClient(stack.mlflow_url).get_model_version_by_alias("digits", "champion")
    assert pointer is not None and version.tags["decision"] == "promoted"
    for part in (f"digits release {pointer.release} is live on prod", "All gates passed", "onnx", "accuracy", "torch"):
        assert part in report.text, part
    in_mlflow = MlflowClient(stack.mlflow_url).download_artifacts(str(version.run_id), "report.html")
    assert Path(in_mlflow).read_bytes() == path.read_bytes()
    (key,) = store.list_keys(f"models/digits/releases/{pointer.release}/reports/")
    found = store.get(key)
    assert flow_run_of(digits) in key and found is not None and found[0] == path.read_bytes()
    assert len(path.read_bytes()) < 300_000


def test_the_report_counts_what_every_stage_took_with_all_its_processes(digits: Ended) -> None:
    folder = Path(re.search(r"report +(\S+)/report\.html", digits.output)[1])  # type: ignore[index]
    costs = {item.stage: item for item in read_costs(folder)}
    assert {"begin", "inspect", "train", "export", "validate", "register", "rehearse", "promote", FLOW} <= costs.keys()
    assert all(item.killed == 0 and item.attempts == 1 for item in costs.values())
    # The ranks say the same of themselves; beside them is the agent that launched them.
    ranks = json.loads((folder / "train" / "result.json").read_text())["result"]["cpu_seconds"]
    assert 0 < ranks <= costs["train"].cpu + 0.05
    assert all(costs[stage].cpu > 0 for stage in ("inspect", "export", "validate", "rehearse"))
    cores = len(os.sched_getaffinity(0))
    assert costs["export"].cpu <= cores * costs["export"].wall + 1


def test_nothing_of_a_run_stays_behind(digits: Ended) -> None:
    assert orphans() == []


# A bare name is asked in services/test_stack.py, a deployment that ships in flows/test_deploy.py.
@pytest.mark.soak
def test_the_bare_deployment_name_runs_and_promotes_the_next_release(
    digits: Ended, command: Command, store: ObjectStore
) -> None:
    before = live(store, "digits")
    assert before is not None
    ended = command("prefect", "deployment", "run", "train-and-ship", "--watch")
    assert ended.status == 0, ended.text
    after = read_pointer(Channel(store, "digits", "prod"))

    assert after is not None
    assert (after.generation, after.previous) == (before[0] + 1, before[1])
    assert [move.generation for move in read_history(Channel(store, "digits", "prod"))] == list(
        range(1, after.generation + 1)
    )


# Differences and rollbacks are asked of stored releases in services/test_diff.py and test_rollback.py.
@pytest.mark.soak
def test_two_releases_can_be_compared_and_the_newer_rolled_back(
    digits: Ended, ship: Ship, store: ObjectStore, stack: Settings
) -> None:
    newer = read_pointer(Channel(store, "digits", "prod"))
    assert newer is not None
    if newer.previous is None:
        assert ship("run", "examples/digits/job.yaml").status == 0
        newer = read_pointer(Channel(store, "digits", "prod"))
        assert newer is not None
    told = ship("diff", "digits", "prod~1", "prod", "--json")
    assert told.status == 0, told.text
    groups = {one["group"] for one in json.loads(told.output)["differences"]}
    # The same job, data and code twice: what is left is what was measured, and the run.
    assert "latency" in groups and not groups & {"job", "packages", "data", "signature", "metrics"}
    assert "within noise" in ship("diff", "digits", "prod~1", "prod").output

    back = ship("rollback", "digits", "--why", "worse in the field")
    assert back.status == 0 and "warning" not in back.text, back.text
    assert live(store, "digits") == (newer.generation + 1, newer.previous)
    champion = MlflowClient(stack.mlflow_url).get_model_version_by_alias("digits", "champion")
    assert champion.tags["release"] == newer.previous


def test_the_nightly_schedule_is_the_one_of_retraining(command: Command) -> None:
    assert "'slug'" not in command("prefect", "deployment", "inspect", "train-and-ship/train-and-ship").output
    ended = command("prefect", "deployment", "inspect", "retrain/retrain")
    assert ended.status == 0, ended.text
    assert "'slug': 'nightly'" in ended.output
    assert "'cron': '0 2 * * *'" in ended.output and "'timezone': 'UTC'" in ended.output

"""The whole flow against the real local stack."""

from __future__ import annotations

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
from tests.support.fixture_types import Command
from tests.support.flow_runs import flow_run_of, read_run
from tests.support.html_pages import checked
from tests.support.processes import Ended, orphans
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.cost import FLOW, read_costs
from train_and_ship.registry.release.manifest import MANIFEST, build_manifest

JOB = "examples/digits/job.yaml"


@pytest.fixture(scope="module")
def shipped(command: Command) -> Ended:
    """The digits example, shipped once by `ship run`."""
    ended = command("ship", "run", JOB)
    assert ended.status == 0, ended.text
    return ended


def only_run(stack: Settings, model: str) -> Any:
    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name(model)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def download_report(stack: Settings, mlflow_run: str) -> str:
    return Path(MlflowClient(stack.mlflow_url).download_artifacts(mlflow_run, "report.html")).read_text()


def test_a_person_sees_progress_with_a_rate_and_an_eta(shipped: Ended) -> None:
    epochs = re.findall(r"epoch (\d+)/12  loss .* accuracy .* samples/s  ETA \d+ s", shipped.text)
    assert epochs == [str(number) for number in range(1, 13)]


def test_the_release_is_live_complete_and_holds_every_format(
    shipped: Ended, store: ObjectStore, tmp_path: Path
) -> None:
    pointer = read_pointer(Channel(store, "digits", "prod"))
    assert pointer is not None
    assert f"digits release {pointer.release} is live on prod" in shipped.output
    assert f"s3://models/models/digits/releases/{pointer.release}/" in shipped.output
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


def test_mlflow_shows_one_version_with_files_curves_data_and_tags(shipped: Ended, stack: Settings) -> None:
    client = MlflowClient(stack.mlflow_url)
    version = client.get_model_version_by_alias("digits", "champion")
    run = client.get_run(version.run_id)

    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "12"
    assert len(client.get_metric_history(version.run_id, "validation_accuracy")) == 12
    assert len(client.get_metric_history(version.run_id, "ranks/step_seconds_1")) == 12
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert version.tags["flow_run_id"] == flow_run_of(shipped)
    assert len(version.tags["sha256.model.onnx"]) == 64
    assert version.tags["serve.latency"] in ("onnx", "pt2", "torchscript")
    for kind in ("onnx", "pt2", "torchscript"):
        assert {f"{kind}.{name}" for name in ("load_ms", "size_mb", "memory_mb")} <= run.data.metrics.keys()
        assert {f"{kind}.samples_per_second.batch_{size}" for size in (1, 8, 64)} <= run.data.metrics.keys()
    first, *rest = (version.description or "").splitlines()
    assert re.fullmatch(r"accuracy 0\.9\d+, all (24|30) gates passed: digits \w+ as onnx, pt2, torchscript\.", first)
    assert any("parity" in line.lower() for line in rest)


def test_pyfunc_loads_the_champion_and_predicts_what_eager_did(
    shipped: Ended, stack: Settings, store: ObjectStore, tmp_path: Path
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


def test_the_run_page_has_progress_and_one_report_with_links(shipped: Ended, stack: Settings) -> None:
    run, artifacts = read_run(flow_run_of(shipped))
    assert run.state is not None and run.state.is_completed()
    by_type = {artifact.type: artifact for artifact in artifacts}

    assert set(by_type) == {"progress", "markdown"}
    assert by_type["progress"].data == 100.0
    report = str(by_type["markdown"].data)
    for part in ("What was trained", "Parity", "Gates", "Speed", "Learning curves", stack.mlflow_url, "s3://models/"):
        assert part in report


def test_the_whole_report_is_one_file_in_the_runs_folder_in_mlflow_and_beside_the_release(
    shipped: Ended, stack: Settings, store: ObjectStore
) -> None:
    path = Path(re.search(r"report +(\S+/report\.html)", shipped.output)[1])  # type: ignore[index]
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
    assert flow_run_of(shipped) in key and found is not None and found[0] == path.read_bytes()
    assert len(path.read_bytes()) < 300_000


def test_the_report_counts_what_every_stage_took_with_all_its_processes(shipped: Ended) -> None:
    folder = Path(re.search(r"report +(\S+)/report\.html", shipped.output)[1])  # type: ignore[index]
    costs = {item.stage: item for item in read_costs(folder)}
    assert {"begin", "inspect", "train", "export", "validate", "register", "rehearse", "promote", FLOW} <= costs.keys()
    assert all(item.killed == 0 and item.attempts == 1 for item in costs.values())
    # The ranks say the same of themselves; beside them is the agent that launched them.
    ranks = json.loads((folder / "train" / "result.json").read_text())["result"]["cpu_seconds"]
    assert 0 < ranks <= costs["train"].cpu + 0.05
    assert all(costs[stage].cpu > 0 for stage in ("inspect", "export", "validate", "rehearse"))
    cores = len(os.sched_getaffinity(0))
    assert costs["export"].cpu <= cores * costs["export"].wall + 1


def test_nothing_of_a_run_stays_behind(shipped: Ended) -> None:
    assert orphans() == []


def test_the_bare_deployment_name_runs_and_promotes_the_next_release(
    shipped: Ended, command: Command, store: ObjectStore
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


def test_two_releases_can_be_compared_and_the_newer_rolled_back(
    shipped: Ended, command: Command, store: ObjectStore, stack: Settings
) -> None:
    newer = read_pointer(Channel(store, "digits", "prod"))
    assert newer is not None
    if newer.previous is None:
        assert command("ship", "run", JOB).status == 0
        newer = read_pointer(Channel(store, "digits", "prod"))
        assert newer is not None
    told = command("ship", "diff", "digits", "prod~1", "prod")
    assert told.status == 0, told.text
    groups = {line.split()[0] for line in told.output.splitlines()[4:]}
    # The same job, data and code twice: what is left is what was measured, and the run.
    assert "latency" in groups and not groups & {"job", "packages", "data", "signature", "metrics"}

    back = command("ship", "rollback", "digits", "--why", "worse in the field")
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


QUICK = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "export": {"formats": ["torchscript"]}}


HIDDEN = """
    import numpy
    class Hidden(nn.Linear):
        def forward(self, x):
            sign = float(numpy.from_dlpack(x.detach())[0, 0] > 0)
            return super().forward(x) * (1 + sign)
    def build_model():
        return Hidden(4, 3)
"""


def test_an_artifact_that_is_not_the_model_stops_the_flow_and_the_report_says_where(
    command: Command, tmp_path: Path
) -> None:
    quick = {**QUICK, "export": {"formats": ["torchscript"]}, "parity": {"cpp": "off"}}
    job = write_project(tmp_path, extra=HIDDEN, name="hidden", **quick)
    ended = command("ship", "run", str(job))
    assert ended.status == 2, ended.text
    assert "torchscript parity" in ended.text
    report = Path(re.search(r"Where and how much: (\S+?parity\.md)", ended.text)[1]).read_text()  # type: ignore[index]
    assert re.search(r"\*\*Where:\*\* first differs at step \d+ of \d+: mul.*plain.py:\d+: return super", report)
    assert "expected" in report and "█" in report
    assert "](parity.svg)" in report
    picture = Path(re.search(r"Where and how much: (\S+?)\.md", ended.text)[1] + ".svg").read_text()  # type: ignore[index]
    # The batches of capture took the same branch.
    assert "torchscript: drawn ✗, 1e-1: " in picture and "torchscript: batches, same: " in picture
    (page,) = [item for item in read_run(flow_run_of(ended))[1] if str(item.key).startswith("parity-")]
    assert "](data:image/svg+xml;base64," in str(page.data)


def test_a_failed_gate_shows_the_table_and_registers_and_promotes_nothing(
    command: Command, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    job = write_project(tmp_path, **QUICK, name="hopeless", gates={"accuracy": {"min": 0.9999}})
    ended = command("ship", "run", str(job))

    assert ended.status == 2
    assert re.search(r"torchscript +accuracy +96 samples +0\.\d+ +>= 0.9999 +FAILED", ended.text)
    assert "Traceback" not in ended.text
    assert live(store, "hopeless") is None and store.list_keys("models/hopeless/") == {}
    assert MlflowClient(stack.mlflow_url).search_registered_models("name = 'hopeless'") == []
    run = only_run(stack, "hopeless")
    assert run.info.status == "FAILED"
    assert "gates failed: torchscript accuracy" in run.data.tags["failure"]
    assert run.data.metrics["validation_accuracy"] < 0.9999
    assert orphans() == []

    (page,) = [item for item in read_run(flow_run_of(ended))[1] if item.key == "report-hopeless"]
    report = checked(download_report(stack, run.info.run_id))
    assert report.headings[0] == "Decision" and {"Gates and metrics", "Learning curves", "Cost"} <= set(report.headings)
    assert "Beside the live release" not in report.headings
    for text in (report.text, str(page.data)):
        assert "hopeless: refused" in text and ">= 0.9999" in text and "1 of " in text


GOOD = {**QUICK, "train": {"epochs": 20, "processes": 1, "batch_size": 32, "learning_rate": 0.02}}
GUARD = {"name": "guarded", "gates": {"accuracy": {"vs_live": 0}}}


def relabelled(store: ObjectStore, folder: Path, **changes: Any) -> str:
    """The live release of `guarded` once more, with another description, made live in its place; returns its id."""
    live = read_pointer(Channel(store, "guarded", "prod"))
    assert live is not None
    manifest = fetch_release(store, "guarded", live.release, folder)
    (folder / MANIFEST).unlink()
    # The id is the hash of the files.
    (folder / "environment.txt").write_text(folder.name)
    described = {"signature": manifest.signature, "metrics": manifest.metrics, **changes}
    made = build_manifest(folder, model="guarded", formats=manifest.formats, **described)
    publish(store, folder, made)
    relabelling = Move(manifest=made, reason="relabelled", moved_by="tester", mlflow_version="1")
    return move_channel(Channel(store, "guarded", "prod"), relabelling, accept=None).release


def test_candidates_are_held_against_the_live_release_itself_not_against_what_it_says_of_itself(
    command: Command, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    good_job = write_project(tmp_path / "good", **GOOD, **GUARD)
    bad_job = write_project(tmp_path / "bad", **QUICK, **GUARD)
    assert command("ship", "run", str(bad_job)).status == 0

    # It boasts; the better candidate replaces it all the same.
    relabelled(store, tmp_path / "boasts", metrics={"accuracy": 1.0})
    ended = command("ship", "run", str(good_job))
    assert ended.status == 0, ended.text
    assert re.search(r"rehearsed from the bucket: 3 checks passed; accuracy 0\.\d+, live 0\.\d+", ended.text)

    # It is modest; the worse candidate does not replace it, and stays in the bucket as a release that is not live.
    relabelled(store, tmp_path / "modest", metrics={"accuracy": 0.0})
    before = live(store, "guarded")
    ended = command("ship", "run", str(bad_job))
    assert ended.status == 2
    assert "the candidate is worse than the live release" in ended.errors
    assert "Traceback" not in ended.text
    assert live(store, "guarded") == before
    challenger = MlflowClient(stack.mlflow_url).get_model_version_by_alias("guarded", "challenger")
    document = download_report(stack, str(challenger.run_id))
    report = checked(document)
    assert "guarded: refused" in report.text and "the candidate is worse than the live release" in report.text
    assert before is not None and f"Beside the live release {before[1]}" in report.headings
    assert "vs_live >= 0" in report.text and "FAILED" in report.text
    (key,) = store.list_keys(f"models/guarded/releases/{challenger.tags['release']}/reports/")
    assert flow_run_of(ended) in key


def test_a_live_release_with_other_inputs_stays_until_a_job_without_vs_live_replaces_it(
    command: Command, store: ObjectStore, tmp_path: Path
) -> None:
    good_job = write_project(tmp_path / "good", **GOOD, **GUARD)
    before = live(store, "guarded")
    if before is None:
        assert command("ship", "run", str(good_job)).status == 0
        before = live(store, "guarded")
    assert before is not None
    signature = fetch_release(store, "guarded", before[1], tmp_path / "last").signature
    other = {**signature, "inputs": [{**signature["inputs"][0], "name": "renamed"}]}
    strange = relabelled(store, tmp_path / "strange", signature=other)
    ended = command("ship", "run", str(good_job))
    assert ended.status == 2
    assert re.search(
        rf"cannot be compared with the live release {strange}: torchscript: its inputs are renamed", ended.errors
    )
    assert "take vs_live (accuracy) out of the job file for one run" in ended.errors
    way_out = write_project(tmp_path / "good", **GOOD, name="guarded", gates={"accuracy": {"min": 0.5}})
    assert command("ship", "run", str(way_out)).status == 0
    after = live(store, "guarded")
    assert after is not None and after[1] != strange


def test_a_candidate_that_is_much_slower_or_larger_than_the_live_release_stays_out(
    command: Command, store: ObjectStore, tmp_path: Path
) -> None:
    gates = {"size_mb": {"times_live": 1.5}, "p50_ms": {"times_live": 5, "max": 1000}, "memory_mb": {"max": 2000}}
    small = write_project(tmp_path, **QUICK, name="weighed", gates=gates)
    assert command("ship", "run", str(small)).status == 0
    before = live(store, "weighed")
    again = command("ship", "run", str(small))
    assert again.status == 0, again.text
    told = read_pointer(Channel(store, "weighed", "prod"))
    assert told is not None and re.fullmatch(r"\S+ against \S+", told.verdicts["p50_ms vs live"])

    large = write_project(
        tmp_path, **QUICK, name="weighed", gates=gates, model={"factory": "plain:build_model", "args": {"width": 9000}}
    )
    ended = command("ship", "run", str(large))
    assert ended.status == 2, ended.text
    assert re.search(r"slower or larger than the live release \w+ allows: .*size_mb 0\.\d+ against 0\.0", ended.errors)
    assert "Traceback" not in ended.text and before is not None
    now = live(store, "weighed")
    assert now == (before[0] + 1, told.release)


def test_a_limit_on_time_or_memory_that_is_not_kept_registers_and_promotes_nothing(
    command: Command, store: ObjectStore, tmp_path: Path
) -> None:
    job = write_project(tmp_path, **QUICK, name="late", gates={"load_ms": {"max": 0.001}, "memory_mb": {"max": 4000}})
    ended = command("ship", "run", str(job))
    assert ended.status == 2
    assert re.search(r"torchscript +load_ms +artifact +[\d.]+ +<= 0\.001 +FAILED", ended.text)
    assert re.search(r"torchscript +memory_mb +artifact +[\d.]+ +<= 4000 +passed", ended.text)
    assert live(store, "late") is None and store.list_keys("models/late/") == {}


def test_a_training_failure_shows_the_users_line_and_leaves_nothing(
    command: Command, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    extra = """
        class Fails(nn.Linear):
            def forward(self, x):
                if self.training:
                    raise KeyError("no such gene")
                return super().forward(x)
        def build_model():
            return Fails(4, 3)
    """
    job = write_project(tmp_path, extra=extra, name="fails", train={"epochs": 1, "processes": 2, "batch_size": 32})
    ended = command("ship", "run", str(job))

    assert ended.status == 2
    assert "no such gene" in ended.errors and "plain.py:" in ended.errors
    assert "site-packages/prefect" not in ended.text
    assert live(store, "fails") is None and orphans() == []
    run = only_run(stack, "fails")
    assert run.info.status == "FAILED" and "no such gene" in run.data.tags["failure"]
    report = checked(download_report(stack, run.info.run_id))
    assert "fails: failed" in report.text and "no such gene" in report.text and "Cost" in report.headings

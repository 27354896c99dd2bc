"""Retraining runs of one model on the real stack: nothing new, better, worse, a warm start, an event."""

from __future__ import annotations

import asyncio
import json
import textwrap
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from tests.support.fixture_types import Ship
from tests.support.flow_runs import read_run
from tests.support.html_pages import checked
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE
from tests.support.projects import CODE, write_project
from tests.support.retraining import MODEL, POOR, Project
from train_and_ship.flows.retrain import retrain
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import code_files, code_fingerprint
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.decisions import FAILED, KEPT, PROMOTED, SKIPPED
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.release.manifest import DATA, JOB, LINEAGE

pytestmark = pytest.mark.in_order
GOOD = {"epochs": 20, "processes": 1, "batch_size": 32, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, store: ObjectStore, stack: Settings) -> Project:
    """The tests of this module are retraining runs that follow each other."""
    return Project(tmp_path_factory.mktemp(MODEL), store)


def test_the_first_night_ships_what_there_is(project: Project) -> None:
    state = project.retrain(train=POOR)
    assert (state.name, state.is_completed()) == ("Promoted", True)
    (decision,) = project.decisions()
    assert decision.decision == PROMOTED and decision.candidate == project.live.release
    assert decision.changed == {"live": "nothing is live on prod"}


def test_a_night_without_anything_new_is_a_recorded_skip_within_seconds(project: Project, stack: Settings) -> None:
    before = project.live
    versions = len(MlflowClient(stack.mlflow_url).search_model_versions(f"name = '{MODEL}'"))
    began = time.perf_counter()
    state = project.retrain(why="a test", train=POOR)
    seconds = time.perf_counter() - began
    assert state.name == "Skipped" and state.is_completed()
    assert "code, data, config and environment are the same" in (state.message or "")
    decision = project.decisions()[-1]
    assert (decision.decision, decision.live, decision.changed) == (SKIPPED, before.release, {})
    assert decision.asked.startswith("a test (") and decision.seconds <= seconds and decision.streak == 1
    run, artifacts = read_run(decision.flow_run)
    assert run.state is not None and run.state.name == "Skipped"
    (artifact,) = artifacts
    assert "| code" in str(artifact.data) and "unchanged" in str(artifact.data)
    # Nothing was trained, registered or left behind.
    assert project.live == before
    assert len(MlflowClient(stack.mlflow_url).search_model_versions(f"name = '{MODEL}'")) == versions
    folder = stack.runs / MODEL / decision.flow_run
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md"]
    report = checked((folder / "report.html").read_text())
    assert report.headings == ["Decision", "Cost"]
    assert "Nothing was trained: nothing has changed" in report.text and "in a row 1" in report.text


def test_a_better_candidate_goes_live_with_the_interval_in_its_record(project: Project) -> None:
    before = project.live
    state = project.retrain(train=GOOD)
    assert state.name == "Promoted", state.message
    decision = project.decisions()[-1]
    assert set(decision.changed) == {"config"} and "train.epochs 1 → 20" in decision.changed["config"]
    after = project.live
    assert (after.generation, after.previous) == (before.generation + 1, before.release)
    assert "95% interval of the improvement +0." in after.verdicts["accuracy vs live"]
    told = read_release_record(project.store, MODEL, after.release)
    assert told.document(LINEAGE)["inputs"].keys() == {"code", "data", "config"}
    data = json.loads(project.store.get(f"models/{MODEL}/releases/{after.release}/{DATA}")[0])  # type: ignore[index]
    assert data["train"]["samples"] == 96 and data["validation"]["columns"] == {}


def test_a_worse_candidate_stays_in_mlflow_as_the_challenger_with_its_report(project: Project, stack: Settings) -> None:
    before = project.live
    state = project.retrain(train=POOR)
    assert state.name == "Kept" and state.is_completed(), state.message
    assert project.live == before
    decision = project.decisions()[-1]
    assert decision.decision == KEPT and "release.policy: better needs it above 0" in decision.why
    client = MlflowClient(stack.mlflow_url)
    challenger = client.get_model_version_by_alias(MODEL, "challenger")
    assert challenger.version == decision.mlflow_version
    assert challenger.tags["release"] == decision.candidate
    assert challenger.tags["decision"] == KEPT and challenger.tags["decision_why"] == f"prod: {decision.why}"
    report = checked(Path(client.download_artifacts(str(challenger.run_id), "report.html")).read_text())
    assert report.headings[:2] == ["Decision", f"Beside the live release {before.release}"]
    for part in ("stays live", "train.epochs 20 → 1", "interval", "95% sure > 0", "FAILED", "parent release"):
        assert part in report.text, part
    assert "recorded when it was made" in report.text
    _, artifacts = read_run(decision.flow_run)
    (page,) = [str(item.data) for item in artifacts if item.key == f"report-{MODEL}"]
    assert "## Decision" in page and "/artifacts/report.html" in page
    assert client.get_run(str(challenger.run_id)).info.status == "FINISHED"


def test_what_was_tried_in_vain_is_not_tried_again(project: Project) -> None:
    state = project.retrain(train=POOR)
    assert state.name == "Skipped" and "were tried at" in (state.message or ""), state.message


def test_an_equal_candidate_goes_live_only_when_it_has_to_be_no_worse(project: Project) -> None:
    code = CODE + "\n# The same model and data, in other words.\n"
    state = project.retrain(train=GOOD, code=code)
    assert state.name == "Kept" and "improvement +0, 95% interval +0 to +0" in project.decisions()[-1].why
    again = project.retrain(train=GOOD, code=code, force=True, release={"policy": "not_worse"})
    assert again.name == "Promoted", again.message


MORE = CODE.replace("torch.randn(size, 4, generator=generator)", "torch.randn(size, 4, generator=generator) * 1.01")
WARM: dict[str, Any] = {"retrain": {"start": "live"}, "release": {"policy": "not_worse", "margin": 0.1}}


def test_new_data_is_noticed_and_a_warm_start_begins_where_the_live_release_is(project: Project) -> None:
    before = project.live
    state = project.retrain(train=POOR, code=MORE, **WARM)
    assert state.name == "Promoted", state.message
    decision = project.decisions()[-1]
    assert {"code", "data"} <= decision.changed.keys()
    assert decision.start == before.release
    told = read_release_record(project.store, MODEL, project.live.release)
    assert told.document(LINEAGE)["start"] == before.release
    # One epoch at this rate learns nothing: what it knows, it has from the live release.
    was = read_release_record(project.store, MODEL, before.release).manifest.metrics["accuracy"]
    assert told.manifest.metrics["accuracy"] >= was - 0.03 > 0.8


def test_weights_that_do_not_fit_the_model_are_refused_with_what_differs(project: Project) -> None:
    before = project.live
    state = project.retrain(
        train=POOR, model={"factory": "plain:build_model", "args": {"width": 16}}, retrain={"start": "live"}
    )
    assert state.is_failed()
    message = str(state.message)
    assert f"the weights of release {before.release} do not fit the model that model.factory makes" in message
    assert "0.weight" in message and "use retrain.start: scratch" in message
    decision = project.decisions()[-1]
    assert decision.decision == FAILED and "do not fit the model" in decision.why
    assert project.live == before


# Resampling is asked in unit/test_resampling.py, the gate of such a metric in flows/test_custom_metrics.py.
@pytest.mark.soak
def test_a_metric_of_ones_own_decides_on_its_resampled_predictions(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    code = CODE + textwrap.dedent("""
        def recall(outputs, target):
            found = (outputs.argmax(1) == 1) & (target == 1)
            return found.sum() / (target == 1).sum()
    """)
    metric = {"factory": "plain:recall", "better": "higher"}
    own = Project(tmp_path, store, "recalling")
    first = own.retrain(code=code, train={**POOR, "metrics": [metric]})
    assert first.name == "Promoted", first.message
    better = own.retrain(code=code, train={**GOOD, "metrics": [metric]})
    assert better.name in ("Promoted", "Kept"), better.message
    decision = own.decisions()[-1]
    assert "95% interval" in decision.why and "recall" in decision.why


def test_the_command_says_what_was_decided_and_history_lists_it(project: Project, ship: Ship) -> None:
    job = str(project.write(train=POOR, code=MORE, **WARM))
    ended = ship("retrain", job, "--why", "by hand")
    assert ended.status == 0, ended.text
    assert f"{MODEL}: skipped, nothing has changed since release" in ended.output
    listed = ship("history", MODEL, "--decisions")
    assert listed.status == 0, listed.text
    words = [line.split()[3] for line in listed.output.splitlines() if line[:1] == "2"]
    assert words[0] == "skipped" and {"promoted", "kept", "failed"} <= set(words)
    assert "asked by: by hand (" in listed.output
    table = ship("status", COLUMNS="300")
    assert table.status == 0, table.text
    row = next((line for line in table.output.splitlines() if f" {MODEL} " in line), table.text)
    assert project.live.release in row and "ago: skipped" in row and "nothing has changed since release" in row


def test_code_and_job_file_that_are_edited_meanwhile_are_trained_as_they_were(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    code = CODE + textwrap.dedent("""
        import os
        from pathlib import Path
        if "RANK" in os.environ:
            Path(__file__).with_name("mended_meanwhile.py").write_text("better = True")
        # While it is decided on: before it is trained.
        job = Path(__file__).with_name("job.yaml")
        job.write_text(job.read_text().replace("epochs: 1", "epochs: 7"))
    """)
    edited = Project(tmp_path, store, "edited")
    write_project(tmp_path, code, name="edited")
    before = code_fingerprint(code_files(tmp_path))
    state = edited.retrain(code=code, train=POOR)
    assert state.name == "Promoted", state.message
    told = read_release_record(store, "edited", edited.live.release)
    assert told.document(LINEAGE)["inputs"]["code"] == before != code_fingerprint(code_files(tmp_path))
    assert "epochs: 7" in (tmp_path / "job.yaml").read_text()
    assert told.document(JOB)["train"]["epochs"] == 1


# What is read, and what is a reason, is asked in unit/test_opened.py and test_made_of.py.
@pytest.mark.soak
def test_a_file_that_the_model_reads_is_a_reason_and_one_that_nobody_reads_is_none(
    tmp_path: Path, store: ObjectStore, stack: Settings
) -> None:
    code = CODE.replace("def build_model(width=8):", "def build_plain(width):") + textwrap.dedent("""
        import json
        from pathlib import Path
        HERE = Path(__file__).parent
        def build_model():
            from safetensors import safe_open
            with safe_open(HERE / "weights" / "first.safetensors", "pt") as file:
                known = file.get_tensor("weight")
            model = build_plain(json.loads((HERE / "config.json").read_text())["width"])
            with torch.no_grad():
                model[0].weight[: len(known)] = known
            return model
    """)
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / "first.safetensors"
    save_file({"weight": torch.zeros(2, 4)}, weights)
    (tmp_path / "config.json").write_text(json.dumps({"width": 8}))
    (tmp_path / "notes.json").write_text("[]")
    read = Project(tmp_path, store, "reads-files")
    job = {"code": code, "train": POOR, "release": {"policy": "always"}}
    assert read.retrain(**job).name == "Promoted"
    (tmp_path / "notes.json").write_text("[1]")
    assert read.retrain(**job).name == "Skipped"
    # The same size, by which nothing is told.
    (tmp_path / "config.json").write_text(json.dumps({"width": 9}))
    save_file({"weight": torch.ones(2, 4)}, weights)
    state = read.retrain(**job)
    assert state.name == "Promoted", state.message
    assert read.decisions()[-1].changed == {"code": "config.json changed, weights/first.safetensors changed"}


def test_an_event_starts_a_run_for_the_model_that_it_names(project: Project, stack: Settings) -> None:
    api = Api(stack)
    deployment = api.ask("GET", "/deployments/name/retrain/retrain")["id"]
    job = str(project.folder / "job.yaml")
    # As `prefect event emit` does.
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "train-and-ship.data.landed",
        "resource": {"prefect.resource.id": f"model.{MODEL}"},
        "payload": {"job": job},
        "id": str(uuid.uuid4()),
    }
    api.ask("POST", "/events", [event])
    asked = {"flow_runs": {"deployment_id": {"any_": [deployment]}}}
    deadline = time.monotonic() + PATIENCE
    runs: list[dict[str, Any]] = []
    while not any(run["state_type"] == "COMPLETED" for run in runs):
        assert time.monotonic() < deadline, runs
        time.sleep(0.5)
        runs = [
            run for run in cast("Any", api.ask("POST", "/flow_runs/filter", asked)) if run["parameters"]["job"] == job
        ]
    (run,) = runs
    assert run["state_name"] == "Skipped"
    assert project.decisions()[-1].asked.startswith("train-and-ship.data.landed (")


def test_a_job_in_which_nothing_is_measured_is_refused_at_once(tmp_path: Path, ship: Ship) -> None:
    job = write_project(tmp_path, name="blind", train={**POOR, "metrics": []})
    ended = ship("retrain", str(job))
    assert ended.status == 2
    assert "nothing is measured, so no candidate can be shown to be better" in ended.errors
    with pytest.raises(JobError):
        asyncio.run(retrain(job=str(job)))

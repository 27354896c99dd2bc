"""What was persisted before the modules moved is read, moved and gone on with by today's code.

The fixture was made by the last code before the move (tests/fixtures/before_the_move). Its names are in the buckets,
the folders, the MLflow and the Prefect of other people: a test that fails here says that an upgrade would break them.
Digests of jobs may change on purpose, when a key is added to job files; then a run that died before the upgrade trains
anew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shipreader.reader import Reader
from tests.support.before_the_move import (
    BEFORE,
    BUCKET,
    FIXTURE,
    LIVE,
    MODEL,
    MOVES,
    RUNS,
    put_bucket,
    put_mlflow,
    put_project,
    put_runs,
    put_served,
    read,
)
from tests.support.fixture_types import Command, Connect, Ship
from tests.support.html_pages import checked
from tests.support.ports import free_port
from tests.support.prefect_api import Api
from tests.support.projects import REPOSITORY
from tests.support.stack_servers import S3Server
from torchworker.contract import GOLDEN, WEIGHTS, InspectResult, ValidateResult, decode
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, read_manifest, verify_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import KEPT, PROMOTED, SKIPPED, read_decisions
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.cost import Rates, read_costs
from train_and_ship.registry.diff import packages_of, read_release_record
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import changes, config_digest
from train_and_ship.registry.release.manifest import DATA, JOB, LINEAGE, VERDICTS
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.run import Ending, Outcome, run_page
from train_and_ship.registry.run_folder import read_run
from train_and_ship.registry.tracking import versions as mlflow_versions
from train_and_ship.registry.tracking.rest import model_registry
from train_and_ship.registry.tracking.runs import RunRecord, open_run
from train_and_ship.tasks.fingerprints import data_fingerprint, inputs_of
from train_and_ship.tasks.inspect import read_facts
from train_and_ship.tasks.requests import project_of, run_params

FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2", "torchscript": "model.torchscript"}


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


@pytest.fixture
def kept(object_store: ObjectStore) -> ObjectStore:
    """A new bucket with what was in the bucket of then."""
    put_bucket(s3_client(Settings.load()), object_store.bucket)
    return object_store


@pytest.fixture
def mlflow(stack: Settings) -> str:
    """A server that has the versions of then: the stack's, for the buckets are others."""
    put_mlflow(stack.mlflow_url)
    return stack.mlflow_url


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name to dtype and shape, by the header of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    return {name: (item["dtype"], item["shape"]) for name, item in header.items() if name != "__metadata__"}


def leaves(value: Any, path: str = "") -> set[str]:
    """Paths of the keys of a document; items of a list are not told apart."""
    if isinstance(value, dict):
        return {inner for name, item in value.items() for inner in leaves(item, f"{path}.{name}")} or {path}
    if isinstance(value, list):
        return {inner for item in value for inner in leaves(item, f"{path}[]")} or {path}
    return {path}


# ---- the bucket


@pytest.mark.parametrize("release", (BEFORE, LIVE), ids=("before", "live"))
def test_a_release_of_then_is_verified_and_everything_that_it_tells_is_read(
    kept: ObjectStore, tmp_path: Path, release: str
) -> None:
    manifest = verify_release(kept, MODEL, release)
    assert verify_release(kept, MODEL, release, read_back=True) == manifest
    assert (manifest.model, manifest.release, manifest.formats) == (MODEL, release, FORMATS)
    assert manifest.serve.keys() == {"latency", "throughput"} and manifest.metrics.keys() == {"accuracy"}
    assert manifest.encode() == (BUCKET / f"models/{MODEL}/releases/{release}/MANIFEST.json").read_bytes()
    folder = tmp_path / release
    assert fetch_release(kept, MODEL, release, folder, manifest_sha256=manifest.sha256()) == manifest

    told = read_release_record(kept, MODEL, release)
    lineage = told.document(LINEAGE)
    job = Job.model_validate(told.document(JOB))
    assert job.digest() == lineage["job_digest"] and config_digest(job) == lineage["inputs"]["config"]
    verdicts: ValidateResult = decode(ValidateResult, told.document(VERDICTS))
    assert verdicts.passed and verdicts.speed is not None and dict(verdicts.speed.serve) == dict(manifest.serve)
    facts: InspectResult = decode(InspectResult, told.document(DATA))
    assert data_fingerprint(facts) == lineage["inputs"]["data"] and facts.train.samples == lineage["train_samples"]
    assert packages_of(told)["train-and-ship"] == "0.1.0"
    assert tensors(folder / WEIGHTS) == {"bias": ("F32", [3]), "weight": ("F32", [3, 2])}
    batch = {"batch_1.input.input", "batch_1.eager.output", "batch_1.float64.output"}
    assert tensors(folder / GOLDEN).keys() >= batch


def test_the_ten_moves_are_read_and_each_says_who_when_and_why(kept: ObjectStore, ship: Ship) -> None:
    assert json.loads(ship("history", MODEL, "--json").output) == MOVES and len(MOVES) == 10
    shown = ship("history", MODEL).output
    assert all(f"{move['release']} replaced" in shown and move["reason"] in shown for move in MOVES)
    assert shown.count("rollback: ") == 4 and "ada@builder" in shown
    live = ship("live", MODEL)
    assert live.status == 0 and f"release {LIVE}" in live.output and "generation 10" in live.output
    assert "version   2 in MLflow" in live.output
    third = ship("live", MODEL, "--at", MOVES[2]["moved_at"], "--json")
    assert json.loads(third.output) == MOVES[2]
    assert LIVE in ship("live", MODEL, "--channel", "staging").output


def test_the_decisions_are_read(kept: ObjectStore, ship: Ship) -> None:
    said = json.loads(ship("history", MODEL, "--decisions", "--json").output)
    files = sorted((BUCKET / f"models/{MODEL}/decisions/prod").iterdir())
    assert said == [json.loads(path.read_bytes()) for path in files]
    assert [one["decision"] for one in said] == [PROMOTED, SKIPPED, KEPT]
    assert "asked by: night 2 (ada@builder)" in ship("history", MODEL, "--decisions").output


def test_what_changed_between_two_releases_is_told(kept: ObjectStore, ship: Ship) -> None:
    done = ship("diff", MODEL, "prod~1", "prod")
    rows = [line.split() for line in done.output.splitlines()]
    assert done.status == 0 and f"prod~1 = {BEFORE}, prod = {LIVE}" in done.output
    assert ["job", "train.epochs", "1", "8", "+7", "(+700.0%)"] in rows
    assert ["job", "data.args.samples", "64", "96", "+32", "(+50.0%)"] in rows
    assert ["data", "train_samples", "64", "96", "+32", "(+50.0%)"] in rows
    groups = {one["group"] for one in json.loads(ship("diff", MODEL, BEFORE, LIVE, "--json").output)["differences"]}
    assert groups >= {"metrics", "parity", "latency", "data", "job"} and "packages" not in groups


def test_a_rollback_is_the_eleventh_move_and_the_aliases_follow(kept: ObjectStore, ship: Ship, mlflow: str) -> None:
    done = ship("rollback", MODEL, "--why", "errors since the upgrade", mlflow=mlflow)
    assert done.status == 0 and done.errors == "" and f"release {BEFORE} is live, generation 11" in done.output
    pointer = read_pointer(Channel(kept, MODEL))
    assert pointer is not None
    assert (pointer.release, pointer.previous, pointer.generation, pointer.mlflow_version) == (BEFORE, LIVE, 11, "1")
    written = json.loads(pointer.encode())
    # What it writes has the names of then.
    assert written.keys() == MOVES[8].keys() and MOVES[8]["kind"] == written["kind"]
    history = json.loads(ship("history", MODEL, "--json").output)
    assert history == [*MOVES, written]
    aliases = {**read("mlflow.json")["aliases"], "champion": "1", "previous": "2"}
    assert dict(model_registry(mlflow).aliases(MODEL)) == aliases


def test_nothing_is_found_to_be_wrong_or_superfluous(kept: ObjectStore, ship: Ship, mlflow: str) -> None:
    done = ship("doctor", MODEL, "--dry-run", mlflow=mlflow)
    assert (done.status, done.output) == (0, "1 model examined: all well\n"), done.text
    kept_for = ship("gc", MODEL, "--slowest-reader", "1s", "--keep", "2", mlflow=mlflow)
    assert kept_for.status == 0, kept_for.text
    why = {words[1]: " ".join(words[5:]) for words in map(str.split, kept_for.output.splitlines()) if len(words) > 5}
    assert (why[LIVE], why[BEFORE]) == ("live on staging", "among the last 2 of prod")
    assert "would" not in kept_for.output


# ---- a serving machine


def test_a_reader_takes_what_is_live_and_follows_it(kept: ObjectStore, ship: Ship, tmp_path: Path) -> None:
    reader = Reader(MODEL, bucket=kept.bucket, folder=tmp_path, client=s3_client(Settings.load()))
    release = reader.pull()
    assert (release.id, release.generation, dict(release.manifest.formats)) == (LIVE, 10, FORMATS)
    assert release.recommended("latency") in FORMATS and release.artifact("onnx").is_file()
    done = ship("rollback", MODEL, "--why", "errors since the upgrade")
    assert done.status == 0, done.text
    assert (reader.pull().id, (tmp_path / "current").resolve().name) == (BEFORE, BEFORE)


def test_the_folder_of_a_serving_machine_is_gone_on_with(connect: Connect, tmp_path: Path) -> None:
    put_served(tmp_path)
    connect("models", f"http://127.0.0.1:{free_port()}")
    with Reader(MODEL, bucket="models", folder=tmp_path, client=s3_client(Settings.load())) as reader:
        assert reader.current is not None and (reader.current.id, reader.current.generation) == (LIVE, 10)


# ---- MLflow


def test_a_version_of_then_is_found_and_its_run_is_gone_on_with(kept: ObjectStore, mlflow: str, tmp_path: Path) -> None:
    assert model_registry(mlflow).versions(MODEL, LIVE) == ["2"]
    run_id = MlflowClient(mlflow).get_model_version(MODEL, "2").run_id
    told = read("mlflow.json")
    job = Job.model_validate(read_release_record(kept, MODEL, LIVE).document(JOB))
    # A retry finds the run by its tag and params, which MLflow never lets change.
    assert run_params(job) == told["run"]["params"]
    record = RunRecord(
        model=MODEL,
        run_name="a retry",
        params=run_params(job),
        tags={"flow_run_id": RUNS["promoted"]},
        description="",
        started=0.0,
    )
    again = open_run(record, mlflow)
    assert (again.run_id, again.finished) == (run_id, True)
    assert again.latest.keys() == told["run"]["metrics"].keys()


def test_what_was_registered_then_is_not_registered_again(kept: ObjectStore, mlflow: str, tmp_path: Path) -> None:
    folder, sha256 = tmp_path / LIVE, read_manifest(kept, MODEL, LIVE).sha256()
    manifest = fetch_release(kept, MODEL, LIVE, folder, manifest_sha256=sha256)
    record = mlflow_versions.VersionRecord(
        model=MODEL,
        folder=folder,
        formats=manifest.formats,
        extra_files=[],
        signature={"inputs": [], "outputs": []},
        params={},
        history=[],
        metrics={},
        dataset_name="",
        dataset_digest="",
        dataset_source="",
        dataset_profile={},
        tags=read("mlflow.json")["versions"]["2"]["tags"],
        description="",
        run_name="",
    )
    assert mlflow_versions.register(record, mlflow).version == "2"
    assert model_registry(mlflow).versions(MODEL, LIVE) == ["2"]


# ---- the next night


def test_retraining_after_the_upgrade_finds_nothing_new(
    kept: ObjectStore, fork_server: ForkServer, tmp_path: Path
) -> None:
    path, run = put_project(tmp_path / "project"), tmp_path / "run"
    run.mkdir()
    job, folder = load_job(path)
    job = job.unattended()
    told = read_release_record(kept, MODEL, LIVE)
    assert job.digest() == told.document(LINEAGE)["job_digest"]
    facts = asyncio.run(read_facts(fork_server, job, project_of(job, folder), run))
    inputs = asyncio.run(inputs_of(Settings.load(), job, folder, data_fingerprint(facts)))
    # The packages of this machine are others, and a reason.
    inputs = dataclasses.replace(inputs, environment=packages_of(told))
    assert changes(inputs, job, told, folder) == {}
    promoted, *_ = read_decisions(Channel(kept, MODEL), 10)
    assert inputs.digest("") == promoted.inputs


def test_a_snapshot_of_then_has_the_name_that_it_would_get_today(ship: Ship, connect: Connect, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(FIXTURE / "data", folder)
    (folder / "SNAPSHOT.json").unlink()
    connect("none")
    done = ship("snapshot", str(folder))
    assert done.status == 0, done.text
    assert (folder / "SNAPSHOT.json").read_bytes() == (FIXTURE / "data" / "SNAPSHOT.json").read_bytes()


# ---- runs


def test_the_folder_of_a_run_that_ended_tells_all_that_its_report_had(tmp_path: Path) -> None:
    put_runs(tmp_path / "runs")
    folder = tmp_path / "runs" / MODEL / RUNS["promoted"]
    run = read_run(folder)
    assert run is not None and run.release == LIVE
    lacks = [field.name for field in dataclasses.fields(run) if getattr(run, field.name) in (None, [], {})]
    # What was warned of was not kept then.
    assert lacks == ["warnings"]
    stages = {"decide", "begin", "inspect", "train", "export", "validate", "register", "rehearse", "promote"}
    assert {spent.stage for spent in read_costs(folder)} >= stages


@pytest.mark.parametrize("left_out", ["", "reference"])
def test_the_report_of_that_run_is_made_again_also_when_a_file_lacks_what_is_read_today(
    left_out: str, tmp_path: Path
) -> None:
    put_runs(tmp_path / "runs")
    folder = tmp_path / "runs" / MODEL / RUNS["promoted"]
    path = folder / "validate" / "verdicts.json"
    verdicts = {**json.loads(path.read_text()), "a_later_field": [1]}
    verdicts.pop(left_out, None)
    path.write_text(json.dumps(verdicts))
    outcome = Outcome(verdict=Ending.PROMOTED, title="again", why="all gates passed")
    found = checked(html(run_page(outcome, read_run(folder), Rates(), "models")))
    proven = ["Speed", "Parity", "Gates and metrics"]
    assert [title for title in proven if title in found.headings] == ([] if left_out else proven)
    for title in ("Decision", "Learning curves", "Data", "Cost", "What was trained", "Lineage"):
        assert title in found.headings


@pytest.fixture
def machine(stack: Settings, store: ObjectStore, tmp_path: Path) -> Iterator[Path]:
    """The stack as it was, with three runs of the model; the job file. Afterwards the model is gone."""

    def clear() -> None:
        for key in store.list_keys(f"models/{MODEL}/"):
            store.delete(key)
        for folder in (stack.runs / MODEL, stack.home / "releases" / MODEL):
            shutil.rmtree(folder, ignore_errors=True)

    clear()
    put_bucket(s3_client(stack), stack.bucket)
    put_runs(stack.runs)
    put_mlflow(stack.mlflow_url)
    yield put_project(tmp_path / "project")
    clear()


def test_a_run_that_died_after_its_export_is_gone_on_with_and_repeats_nothing(
    machine: Path, ship: Ship, store: ObjectStore, stack: Settings
) -> None:
    shown = ship("status", COLUMNS="250")
    assert shown.status == 0 and MODEL in shown.output and LIVE in shown.output, shown.text
    run = stack.runs / MODEL / RUNS["after_export"]
    complete = {name: (run / name / "STAGE.json").read_bytes() for name in ("inspect", "train", "export")}
    ended = ship("retrain", str(machine), "--resume", run.name)
    assert ended.status == 0, ended.text
    for stage in ("train", "export"):
        assert f"{stage}: already complete in this run, verified by hash" in ended.text
    assert {name: (run / name / "STAGE.json").read_bytes() for name in complete} == complete
    # The plan of then holds: the live release of then, and training from scratch.
    decision = read_decisions(Channel(store, MODEL), 1)[-1]
    assert (decision.decision, decision.live, decision.start) == (KEPT, LIVE, "")
    assert json.loads((run / "release/files/lineage.json").read_text())["begun"] == (run / "begun").read_text()
    assert f"release {LIVE} stays live on prod" in ended.output and not (run / "decision.json").exists()


# One that died after its export is gone on with above.
@pytest.mark.soak
def test_a_run_that_died_in_training_goes_on_from_its_checkpoint_and_what_it_writes_has_the_names_of_then(
    machine: Path, ship: Ship, store: ObjectStore, stack: Settings
) -> None:
    from mlflow import MlflowClient

    run = stack.runs / MODEL / RUNS["in_training"]
    ended = ship("run", str(machine), "--resume", run.name)
    assert ended.status == 0, ended.text
    assert "resumed from step 5 of 24" in ended.text
    pointer = read_pointer(Channel(store, MODEL))
    assert pointer is not None and (pointer.generation, pointer.previous) == (11, LIVE)

    then, now = read_release_record(store, MODEL, LIVE), read_release_record(store, MODEL, pointer.release)
    assert now.manifest.files.keys() == then.manifest.files.keys()
    assert json.loads(now.manifest.encode()).keys() == json.loads(then.manifest.encode()).keys()
    assert now.manifest.signature == then.manifest.signature
    for document in (JOB, VERDICTS, LINEAGE, DATA):
        # There may be more since then, under other names.
        assert leaves(then.document(document)) <= leaves(now.document(document)), document
    assert leaves(now.document(JOB)) == leaves(then.document(JOB))
    for name in (WEIGHTS, GOLDEN):
        assert tensors(run / "release" / "files" / name) == tensors(BUCKET / f"models/{MODEL}/releases/{LIVE}/{name}")
    assert set(json.loads(pointer.encode())) == set(MOVES[0])

    told, client = read("mlflow.json"), MlflowClient(stack.mlflow_url)
    version = client.get_model_version(MODEL, pointer.mlflow_version)
    # The first version was made by `ship run` too, and by no night, which adds its decision.
    # Hashes were a tag for each file.
    tags = {"sha256" if name.startswith("sha256.") else name for name in told["versions"]["1"]["tags"]}
    assert version.tags.keys() == tags
    assert version.tags["flow_run_id"] == run.name
    made = client.get_run(version.run_id)
    assert made.data.params == told["run"]["params"] and made.data.tags.keys() == told["run"]["tags"].keys()
    # Whether one rank held up the other in a step that was looked at is chance; its name has a test of its own.
    measured = {name for name in made.data.metrics if not name.startswith("system/")}
    assert measured - {"ranks/straggler"} == told["run"]["metrics"].keys() - {"ranks/straggler"}
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    files = sorted(item.path for item in client.list_logged_model_artifacts(logged.model_id))
    assert (logged.name, files) == (told["logged_model"]["name"], told["logged_model"]["artifacts"])


def test_the_samples_of_a_run_of_then_are_found_when_its_release_is_promoted(
    machine: Path, ship: Ship, store: ObjectStore
) -> None:
    back = ship("rollback", MODEL, "--why", "an exercise")
    assert back.status == 0, back.text
    done = ship("promote", MODEL, "--from", "staging", "--again", "--why", "it is over")
    assert done.status == 0 and "both measured on 48 held-out samples" in done.output, done.text


# ---- Prefect


def test_deployments_have_the_names_and_parameters_of_then(stack: Settings) -> None:
    told = read("deployments.json")
    api = Api(stack)
    for then in told["deployments"]:
        if then["name"] == MODEL:
            continue
        now = api.ask("GET", f"/deployments/name/{then['flow_name']}/{then['name']}")
        # A move names its model since: one that named none moved `digits`.
        before = {key: value for key, value in then["parameters"].items() if key != "model"}
        assert now["parameters"] == before, then["name"]
        for name in ("tags", "work_pool_name"):
            assert now[name] == then[name], then["name"]
        known, taken = (item["parameter_openapi_schema"] for item in (then, now))
        # What came later has a default, so that a run asked for as then is the same.
        assert taken.get("required") == known.get("required")
        for name, before in known["properties"].items():
            # `resume` is an id since then, and the form says so.
            assert {key: said for key, said in taken["properties"][name].items() if key != "pattern"} == before
        assert [item["slug"] for item in now["schedules"]] == [item["slug"] for item in then["schedules"]]
    automations: Any = api.ask("POST", "/automations/filter", {})
    assert sorted(item["name"] for item in automations) == told["automations"]


@pytest.fixture
def deployed(stack: Settings, machine: Path) -> Iterator[str]:
    """The deployment of the model as `ship deploy` had made it; its id. Afterwards it is gone."""
    api = Api(stack)
    (then,) = (item for item in read("deployments.json")["deployments"] if item["name"] == MODEL)
    text = json.dumps(then).replace("@REPOSITORY@", str(REPOSITORY)).replace("@PROJECT@", str(machine.parent))
    body: dict[str, Any] = json.loads(text)
    body.pop("global_concurrency_limit")
    flow = api.ask("POST", "/flows/", {"name": body.pop("flow_name")})
    made = api.ask("POST", "/deployments/", {**body, "flow_id": flow["id"], "concurrency_limit": 1})
    yield str(made["id"])
    api.ask("DELETE", f"/deployments/{made['id']}")


# Its names and parameters are asked above; a night of a deployment is in flows/test_deploy.py.
@pytest.mark.soak
def test_a_deployment_of_then_trains_its_model_after_the_next_ship_up(
    deployed: str, stack: Settings, command: Command, store: ObjectStore
) -> None:
    # As after an upgrade: what was deployed last was deployed by other code.
    (stack.home / "prefect" / "deployed").write_text("by code of before\n")
    up = command("ship", "up")
    assert up.status == 0, up.text
    api = Api(stack)
    now = api.ask("GET", f"/deployments/{deployed}")
    assert now["name"] == MODEL and now["schedules"][0]["schedule"]["cron"] == "30 3 * * *"
    ended = api.wait(api.start("retrain", MODEL, why="night 4"), "Skipped", "Kept", "Promoted", seconds=240)
    assert ended["state_type"] == "COMPLETED"
    assert read_decisions(Channel(store, MODEL), 1)[-1].asked.startswith("night 4 (")

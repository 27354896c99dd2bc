"""A deployment a job file."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE
from tests.support.projects import write_project
from tests.support.repositories import git, repository
from train_and_ship.infra.job_folders import FILE
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.project_archive import TREE
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.projects import Reference

SHORT = {"epochs": 1, "processes": 1, "batch_size": 32}


def job_of(folder: Path, name: str, **more: Any) -> Path:
    return write_project(folder / name, name=name, train=SHORT, export={"formats": ["torchscript"]}, **more)


def deployed(stack: Settings) -> dict[str, dict[str, Any]]:
    """By name: what the server has of the flow `retrain`."""
    body = {"flows": {"name": {"any_": ["retrain"]}}}
    return {item["name"]: item for item in Api(stack).ask("POST", "/deployments/filter", body)}


def nightly(deployment: dict[str, Any]) -> tuple[str, str]:
    (schedule,) = deployment["schedules"]
    return schedule["schedule"]["cron"], schedule["schedule"]["timezone"]


def scheduled(stack: Settings, name: str) -> list[dict[str, Any]]:
    """The runs that wait for their time, once there are some."""
    query = {
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    deadline = time.monotonic() + PATIENCE
    while True:
        found: list[dict[str, Any]] = Api(stack).ask("POST", "/flow_runs/filter", query)
        if found:
            return found
        assert time.monotonic() < deadline, f"Prefect schedules no run of {name}"
        time.sleep(1)


def test_each_job_file_gets_a_deployment_that_ships_its_model_and_deploying_again_changes_only_what_is_asked(
    ship: Ship, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    jobs = [job_of(tmp_path, name) for name in ("alpha", "beta")]
    commit = git(repository(tmp_path), "rev-parse", "HEAD")
    done = ship("deploy", *map(str, jobs), "--cron", "30 3 * * *", "--timezone", "Europe/Berlin")
    assert done.status == 0 and "retrain/alpha  30 3 * * * Europe/Berlin" in done.output, done.text
    found = deployed(stack)
    assert {"alpha", "beta", "retrain"} <= found.keys()
    assert [nightly(found[name]) for name in ("alpha", "beta")] == [("30 3 * * *", "Europe/Berlin")] * 2
    assert all(found[name]["global_concurrency_limit"]["limit"] == 1 for name in ("alpha", "beta"))

    # They name no folder of this machine, and what they name is what the worker runs from now on.
    sent = {name: Reference.parse(found[name]["parameters"]["job"]) for name in ("alpha", "beta")}
    assert str(tmp_path) not in json.dumps([found["alpha"], found["beta"]])
    kept = json.loads((stack.home / FILE).read_text())
    assert all(one is not None and str(one.folder(stack.home) / TREE) in kept for one in sent.values())

    again = ship("deploy", "--in-place", str(jobs[0]))
    assert again.status == 0, again.text
    after = deployed(stack)
    assert after["alpha"]["id"] == found["alpha"]["id"]
    assert nightly(after["alpha"]) == nightly(found["retrain"]) and nightly(after["beta"]) == nightly(found["beta"])

    # What was deployed is trained, whatever has become of the folder.
    shutil.rmtree(tmp_path)
    api = Api(stack)
    api.wait(api.start("retrain", "beta"), "Promoted")
    pointer = live(store, "beta")
    assert pointer is not None and live(store, "alpha") is None
    lineage = store.get(f"models/beta/releases/{pointer[1]}/lineage.json")
    assert lineage is not None and json.loads(lineage[0])["git_commit"] == commit


def test_the_next_nights_are_there_as_runs_that_wait_for_their_time(
    ship: Ship, stack: Settings, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "zeta", retrain={"cron": "30 3 * * *", "timezone": "Europe/Berlin"})
    done = ship("deploy", "--in-place", str(job))
    assert done.status == 0 and "retrain/zeta  30 3 * * * Europe/Berlin" in done.output, done.text
    when = datetime.fromisoformat(scheduled(stack, "zeta")[0]["expected_start_time"])
    assert (when.astimezone(ZoneInfo("Europe/Berlin")).hour, when.minute) == (3, 30)


def test_a_time_that_there_is_not_in_one_night_of_the_year_is_said_where_the_schedule_is_made(
    ship: Ship, stack: Settings, tmp_path: Path
) -> None:
    jobs = [str(job_of(tmp_path, name)) for name in ("eta", "theta")]
    done = ship("deploy", "--in-place", *jobs, "--cron", "30 2 * * *", "--timezone", "Europe/Berlin")
    assert done.status == 0, done.text
    # Once, whatever number of models have this schedule.
    assert done.errors.count("has no 02:30 in Europe/Berlin (clocks go from 02:00 to 03:00); Prefect starts it at") == 1


def test_a_mistake_in_one_job_file_deploys_none_of_them(ship: Ship, stack: Settings, tmp_path: Path) -> None:
    good, twin = job_of(tmp_path, "gamma"), job_of(tmp_path / "twin", "gamma")
    bad = job_of(tmp_path, "delta")
    bad.write_text(bad.read_text().replace("epochs", "epoch"))
    done = ship("deploy", "--in-place", str(good), str(twin), str(bad))
    assert done.status == 2 and "Traceback" not in done.text
    assert "epochs" in done.errors and f"gamma is the model of {good} too" in done.errors
    assert "nothing was deployed" in done.errors and not {"gamma", "delta"} & deployed(stack).keys()


def test_a_schedule_that_cannot_be_read_is_refused(ship: Ship, stack: Settings, tmp_path: Path) -> None:
    job = str(job_of(tmp_path, "epsilon"))
    for option, value in (("--cron", "every night"), ("--timezone", "Europe/Bonn")):
        done = ship("deploy", "--in-place", job, option, value)
        assert done.status == 2 and value in done.errors and "Traceback" not in done.text, done.text
    assert "epsilon" not in deployed(stack)


def test_ship_up_renames_the_flow_of_an_elder_deployment_of_ours_and_of_no_other(
    ship: Ship, stack: Settings, tmp_path: Path
) -> None:
    jobs = [job_of(tmp_path, name) for name in ("elder", "foreign")]
    assert ship("deploy", "--in-place", *map(str, jobs)).status == 0
    stored = {"elder": "flows.retrain.retrain", "foreign": "flows.retrain.weekly"}
    for name, entrypoint in stored.items():
        Api(stack).ask("PATCH", f"/deployments/{deployed(stack)[name]['id']}", {"entrypoint": entrypoint})

    assert ship("up").status == 0

    found = deployed(stack)
    assert found["elder"]["entrypoint"] == found["retrain"]["entrypoint"] == "train_and_ship.flows.retrain.retrain"
    assert found["foreign"]["entrypoint"] == "flows.retrain.weekly"

"""Which prefect.yaml `ship up` deploys: that of a clone, or the installed one without what only a clone has."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from train_and_ship.infra.deployments import INSTALLED, deploy

OURS = {"retrain", "train-and-ship", "rollback", "promote", "watch"}
COMMAND = [sys.executable, "-c", "import pathlib; pathlib.Path('asked').touch()"]
"""In place of `prefect deploy --all`: leaves a file where it was run."""


class Server:
    """What of Prefect is asked, with the deployments that the command would have made."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __call__(self, method: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
        assert (method, path) == ("POST", "/deployments/filter")
        return httpx.Response(200, json=[{"name": name, "entrypoint": "x", "id": name} for name in self.names])


def up(home: Path, names: set[str] = OURS) -> str:
    said: list[str] = []
    deploy(api=Server(names), command=COMMAND, environment={}, state=home / "deployed", report=said.append)
    return "\n".join(said)


def asked(folder: Path) -> bool:
    """Whether the command was run there, since this was asked last."""
    there = (folder / "asked").exists()
    (folder / "asked").unlink(missing_ok=True)
    return there


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/prefect.yaml").write_text(INSTALLED.read_text())
    return tmp_path / "clone"


def test_outside_a_clone_the_flows_are_deployed_without_the_job_of_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "promote, retrain, rollback, train-and-ship, watch (" in up(tmp_path)
    assert asked(tmp_path / "installed")
    made = yaml.safe_load((tmp_path / "installed/prefect.yaml").read_text())["deployments"]
    assert {deployment["name"] for deployment in made} == OURS
    assert not any("job" in deployment.get("parameters", {}) for deployment in made)
    retrain = next(deployment for deployment in made if deployment["name"] == "retrain")
    # For `ship deploy` to copy; the pattern itself has nothing to do.
    assert retrain["schedules"] == [{"slug": "nightly", "cron": "0 2 * * *", "timezone": "UTC", "active": False}]
    # Whoever begins a rollout switches it on.
    (each_minute,) = next(deployment for deployment in made if deployment["name"] == "watch")["schedules"]
    assert (each_minute["cron"], each_minute["active"]) == ("* * * * *", False)
    assert retrain["triggers"][0]["parameters"]["job"] == "{{ event.payload.job }}"
    assert "(unchanged)" in up(tmp_path)
    assert not asked(tmp_path / "installed")


def test_what_a_clone_has_deployed_stays_as_it_is_when_another_project_starts_the_stack(
    tmp_path: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    up(tmp_path)
    assert asked(clone)
    monkeypatch.chdir(tmp_path)
    assert "(unchanged)" in up(tmp_path) and not asked(tmp_path / "installed")
    monkeypatch.chdir(clone)
    assert "(unchanged)" in up(tmp_path) and not asked(clone)


def test_a_clone_deploys_its_job_over_flows_without_one(
    tmp_path: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    up(tmp_path)
    monkeypatch.chdir(clone)
    up(tmp_path)
    assert asked(clone)


def test_a_prefect_yaml_of_the_users_own_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefect.yaml").write_text("name: shop\ndeployments:\n- {name: reports, entrypoint: 'reports.py:f'}\n")
    monkeypatch.chdir(tmp_path)
    assert "reports" not in up(tmp_path)
    assert not asked(tmp_path) and asked(tmp_path / "installed")

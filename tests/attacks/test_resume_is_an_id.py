"""What a run is to go on with wants to be a path that leads out of the folder of runs."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import Flow

from tests.support.projects import write_project
from tests.support.ship_here import ship_here
from train_and_ship.flows.retrain import retrain
from train_and_ship.flows.train_and_ship import train_and_ship
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.rundir import require_run_id, run_folder
from train_and_ship.tasks.outcome import origin

RUN = "0932e559-aef2-4a0b-8800-1413436e53d9"
PATHS = ["..", ".", "../other", "/etc", f"../{RUN}", f"{RUN}/..", f"{RUN}\n", f" {RUN}", RUN.upper(), "run.lock", "*"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_refused_before_anything_is_made(tmp_path: Path, path: str) -> None:
    runs = tmp_path / "runs" / "digits"
    (runs / RUN).mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    with pytest.raises(JobError, match="resume: expected the id of a"):
        run_folder(runs, "", path)
    with pytest.raises(JobError, match="resume: expected the id of a flow run"):
        require_run_id(path)
    assert run_folder(runs, "", RUN) == runs / RUN


def test_a_link_in_place_of_a_run_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / RUN).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JobError, match="resume: expected the id of a run"):
        run_folder(tmp_path, "", RUN)


@pytest.mark.parametrize("command", ["run", "retrain"])
def test_the_commands_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs" / "digits").mkdir(parents=True)
    ended = ship_here(capsys, command, str(write_project(tmp_path / "project")), "--resume", "..")
    assert ended.status == 2 and "resume: expected the id of a run" in ended.errors and "Traceback" not in ended.text
    assert [path.name for path in (tmp_path / "home" / "runs").rglob("*")] == ["digits"]


@pytest.mark.parametrize("flow", [train_and_ship, retrain])
def test_deployments_and_forms_of_prefect_refuse_it(flow: Flow[Any, Any]) -> None:
    for path in PATHS:
        with pytest.raises(Exception, match="resume"):
            flow.validate_parameters({"resume": path})
    assert flow.validate_parameters({"resume": RUN})["resume"] == RUN
    assert flow.validate_parameters({"resume": ""})["resume"] == ""
    # What a deployment keeps, and the server holds new runs against.
    assert flow.parameters.properties["resume"]["pattern"].startswith("^([0-9a-f]{8}")


def test_whoever_cleans_up_after_a_run_follows_no_path_either() -> None:
    asked: Any = SimpleNamespace(id=uuid.UUID(RUN), parameters={"resume": "../../elsewhere"})
    assert origin(asked) == RUN

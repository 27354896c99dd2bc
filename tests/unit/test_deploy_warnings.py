"""What `ship deploy` says of a job that its worker may not be able to run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.projects import write_project
from train_and_ship.ship import deploy
from train_and_ship.tasks import deployments


def test_a_variable_that_is_not_set_here_is_named_and_nothing_is_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / ".ship"))
    monkeypatch.setenv("REVIEW_PAGES", "2")
    monkeypatch.setattr(deploy, "require_prefect", lambda _: None)
    shown = SimpleNamespace(schedule="0 2 * * *", skipped=())
    monkeypatch.setattr(deployments, "deploy_jobs", lambda jobs, *_: dict.fromkeys(jobs, shown))
    job = write_project(tmp_path / "mine", name="reviews", env=["REVIEW_PAGES", "REVIEW_LANGUAGE"])
    deploy.deploy([job], None, None, deploy.Where(in_place=True))
    said = capsys.readouterr()
    assert "reviews  0 2 * * *" in said.out
    assert "warning: reviews: env: REVIEW_LANGUAGE is not set here" in said.err and "REVIEW_PAGES" not in said.err

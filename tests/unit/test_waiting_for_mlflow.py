"""What is trained and proven waits for an MLflow that is away, for as long as is said, and is not lost."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.tracking.connection import AwayError
from train_and_ship.tasks import register as stage


class Mlflow:
    """Away for so many tries, then it makes a version or answers with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: int, then: Exception | None = None) -> None:
        self.away, self.then, self.asked = away, then, 0
        monkeypatch.setattr(stage, "check_reachable", self.look)
        monkeypatch.setattr(stage.mlflow_versions, "register", self.register)
        monkeypatch.setattr(stage, "PAUSES", (0.01,))
        monkeypatch.setattr(stage, "get_run_logger", lambda: logging.getLogger("waiting"))

    def look(self, url: str) -> None:
        self.asked += 1
        if self.asked <= self.away:
            raise AwayError(f"MLflow at {url} does not answer (refused).")

    def register(self, record: Any, url: str) -> str:
        if self.asked <= self.away:
            self.look(url)
        if self.then is not None:
            raise self.then
        return "version 1"


def registered(tmp_path: Path, seconds: float) -> Any:
    settings = Settings.load().model_copy(update={"mlflow_wait_seconds": seconds, "external_mlflow": "http://mlflow"})
    run: Any = SimpleNamespace(settings=settings, folder=tmp_path / "the-run", flow_run_id="its-id")
    record: Any = None
    return asyncio.run(stage._registered(record, run))


def test_a_version_is_made_when_mlflow_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = Mlflow(monkeypatch, away=5)
    monkeypatch.setattr(stage, "SAY_SECONDS", 0.02)
    caplog.set_level(logging.INFO)
    assert registered(tmp_path, 60) == "version 1" and mlflow.asked >= 5
    said = [record.getMessage() for record in caplog.records if record.name == "waiting"]
    assert "MLflow at http://mlflow does not answer" in said[0] and "wait up to 60 s" in said[0]
    assert any("still away" in line for line in said[1:-1]) and "MLflow is back after" in said[-1]


def test_a_run_whose_mlflow_stays_away_ends_once_and_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Mlflow(monkeypatch, away=1_000_000)
    with pytest.raises(
        AwayError, match=r"waits 0\.05 s .*SHIP_MLFLOW_WAIT_SECONDS.*--resume the-run.*its-id"
    ) as raised:
        registered(tmp_path, 0.05)
    # The task's own retries would wait as long again, three times.
    assert not raised.value.retryable and str(tmp_path / "the-run") in str(raised.value)


def test_nobody_waits_who_does_not_want_to_nor_for_an_mlflow_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = Mlflow(monkeypatch, away=9)
    with pytest.raises(AwayError):
        registered(tmp_path, 0)
    assert mlflow.asked == 1
    Mlflow(monkeypatch, away=0, then=ServiceError("MLflow answered: the disk is full"))
    with pytest.raises(ServiceError, match="disk is full") as raised:
        registered(tmp_path, 60)
    assert raised.value.retryable

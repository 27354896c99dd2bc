"""A test finds its process as if it were the first one."""

from __future__ import annotations

import os

import mlflow
import pytest

pytestmark = pytest.mark.in_order
ELSEWHERE = "http://127.0.0.1:9"


def test_a_test_may_change_the_environment() -> None:
    os.environ["SHIP_LEFT_BEHIND"] = "1"
    mlflow.set_tracking_uri(ELSEWHERE)
    assert os.environ["MLFLOW_TRACKING_URI"] == ELSEWHERE


def test_the_next_one_finds_it_as_it_was() -> None:
    assert "SHIP_LEFT_BEHIND" not in os.environ
    assert ELSEWHERE not in (os.environ["MLFLOW_TRACKING_URI"], mlflow.get_tracking_uri())

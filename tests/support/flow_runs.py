"""The report of a run, where people find it."""

from __future__ import annotations

import mlflow
from mlflow import MlflowClient

from infra.settings import Settings
from tests.support.prefect_api import Api


def reports_in_prefect(api: Api, run: str) -> list[str]:
    """As markdown, the oldest first."""
    return [str(item["data"]) for item in api.artifacts(run) if str(item["key"]).startswith("report-")]


def report_in_mlflow(stack: Settings, model: str, version: str) -> str:
    """As HTML."""
    run = MlflowClient(stack.mlflow_url).get_model_version(model, version).run_id
    return str(mlflow.artifacts.load_text(f"runs:/{run}/report.html"))

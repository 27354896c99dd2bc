"""Runs of flows, as people find them: their ids, folders, artifacts and reports, and what a refusal looks like."""

from __future__ import annotations

import asyncio
import re

import mlflow
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun

from tests.support.prefect_api import Api
from tests.support.processes import Ended, orphans
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings

STAGES = ("train", "export", "validate", "release", "rehearse")
"""Folders of a run, in order."""


def flow_run_of(ended: Ended) -> str:
    """Id of the run that a command says where to look at."""
    found = re.search(r"flow-run/([0-9a-f-]{36})", ended.text)
    assert found, ended.text
    return found[1]


def read_run(flow_run_id: str) -> tuple[FlowRun, list[Artifact]]:
    """The run and its artifacts, of Prefect."""

    async def read() -> tuple[FlowRun, list[Artifact]]:
        async with get_client() as client:
            run = await client.read_flow_run(flow_run_id)
            chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
            return run, await client.read_artifacts(artifact_filter=chosen)

    return asyncio.run(read())


def reports_in_prefect(api: Api, run: str) -> list[str]:
    """As markdown, the oldest first.

    Each document once: Prefect's client sends a request again that was not answered in time, and a busy server may have
    kept the first.
    """
    found = (str(item["data"]) for item in api.artifacts(run) if str(item["key"]).startswith("report-"))
    return list(dict.fromkeys(found))


def report_in_mlflow(stack: Settings, model: str, version: str) -> str:
    """As HTML."""
    run = MlflowClient(stack.mlflow_url).get_model_version(model, version).run_id
    return str(mlflow.artifacts.load_text(f"runs:/{run}/report.html"))


def refused(ended: Ended, store: ObjectStore, *words: str) -> None:
    """A command about the model `mistaken` said these words, and has left nothing behind."""
    for word in words:
        assert word in ended.errors, ended.text
    assert ended.status in (1, 2)
    assert "Traceback" not in ended.text
    assert store.list_keys("models/mistaken/") == {}
    assert orphans() == []

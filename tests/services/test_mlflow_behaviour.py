"""What MLflow does that one would not guess: rows of docs/compatibility.md that no other test holds."""

from __future__ import annotations

import time

import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric

from tests.support.stack_servers import MlflowServer


@pytest.fixture(scope="module")
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.url)


@pytest.fixture(scope="module")
def experiment(client: MlflowClient) -> str:
    return client.create_experiment("behaviour")


def test_a_search_returns_versions_without_aliases_and_an_alias_is_no_update(client: MlflowClient) -> None:
    client.create_registered_model("behaviour")
    version = client.create_model_version("behaviour", "s3://bucket/release").version
    before = client.get_model_version("behaviour", version).last_updated_timestamp
    time.sleep(0.01)
    client.set_registered_model_alias("behaviour", "prod", version)
    client.set_model_version_tag("behaviour", version, "sha256", "0")
    got = client.get_model_version("behaviour", version)
    assert (got.aliases, got.last_updated_timestamp) == (["prod"], before)
    (found,) = client.search_model_versions("name = 'behaviour'")
    assert found.aliases == []


def test_long_texts_of_a_run_are_cut_and_those_of_a_version_refused(client: MlflowClient, experiment: str) -> None:
    run = client.create_run(experiment).info.run_id
    client.log_param(run, "job", "x" * 6001)
    client.set_tag(run, "job", "x" * 8001)
    data = client.get_run(run).data
    assert (len(data.params["job"]), len(data.tags["job"])) == (6000, 8000)
    client.create_registered_model("behaviour-long")
    version = client.create_model_version("behaviour-long", "s3://bucket/release").version
    with pytest.raises(MlflowException, match="100000"):
        client.set_model_version_tag("behaviour-long", version, "job", "x" * 100_001)


def test_a_runs_metric_is_the_one_of_the_highest_step_not_the_last_that_was_logged(
    client: MlflowClient, experiment: str
) -> None:
    run = client.create_run(experiment).info.run_id
    client.log_batch(run, [Metric("loss", 1.0, 1000, 5)])
    client.log_batch(run, [Metric("loss", 2.0, 9000, 4)])
    # And a point that is sent again is one.
    client.log_batch(run, [Metric("loss", 2.0, 9000, 4), Metric("zero", -0.0, 1000, 0)])
    assert client.get_run(run).data.metrics["loss"] == 1.0
    assert len(client.get_metric_history(run, "loss")) == 2
    assert str(client.get_run(run).data.metrics["zero"]) == "0.0"


def test_a_run_that_is_running_again_keeps_the_time_at_which_it_had_ended(
    client: MlflowClient, experiment: str
) -> None:
    run = client.create_run(experiment).info.run_id
    client.set_terminated(run, "FINISHED", 5000)
    client.update_run(run, "RUNNING")
    info = client.get_run(run).info
    assert (info.status, info.end_time) == ("RUNNING", 5000)

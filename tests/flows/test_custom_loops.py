"""The examples with a loop of their own, through the whole flow, and what is said of a loop that does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.fixture_types import Ship
from tests.support.flow_runs import flow_run_of, read_run, refused
from tests.support.projects import REPOSITORY, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer


# `distributed/test_custom_loop.py` trains with loops of one's own, and the tests below build both examples.
@pytest.mark.soak
@pytest.mark.parametrize(
    ("example", "names", "reports"),
    [
        ("own_loop", {"train_loss", "validation_loss", "validation_accuracy"}, 20),
        ("lightning", {"train_loss", "validation_loss", "validation_accuracy"}, 8),
    ],
)
def test_an_example_with_its_own_loop_is_trained_proven_and_promoted(
    ship: Ship, stack: Settings, store: ObjectStore, example: str, names: set[str], reports: int
) -> None:
    path = REPOSITORY / "examples" / example / "job.yaml"
    job = yaml.safe_load(path.read_text())
    assert len(path.read_text().splitlines()) < 25
    for module in path.parent.glob("*.py"):
        assert not re.search(
            r"^(from|import) (flows|tasks|registry|infra|torchworker|ship)\b", module.read_text(), re.M
        )

    ended = ship("run", str(path))
    assert ended.status == 0, ended.text
    assert "Traceback" not in ended.text
    pointer = read_pointer(Channel(store, job["name"], "prod"))
    assert pointer is not None
    prefix = f"models/{job['name']}/releases/{pointer.release}"
    lineage = json.loads(store.get(f"{prefix}/lineage.json")[0])
    assert len(lineage["history"]) == reports and len(lineage["data_fingerprint"]) == 32
    assert names <= lineage["history"][-1].keys()
    shipped = json.loads(store.get(f"{prefix}/job.json")[0])
    assert shipped["train"]["entrypoint"] == job["train"]["entrypoint"] and "optimizer" not in shipped["train"]

    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name(job["name"])
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["train.entrypoint"] == job["train"]["entrypoint"]
    assert run.data.params["train.args.epochs"] == str(job["train"]["args"]["epochs"])
    assert "train.optimizer" not in run.data.params
    steps = [row["step"] for row in lineage["history"]]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation_accuracy")] == steps

    _, artifacts = read_run(flow_run_of(ended))
    pages = {artifact.key: str(artifact.data) for artifact in artifacts}
    assert any("## Learning curves" in page and "| step" in page for page in pages.values())


@pytest.mark.parametrize("example", ["own_loop", "lightning"])
def test_check_finds_the_loop_and_builds_model_and_data_without_running_it(ship: Ship, example: str) -> None:
    ended = ship("check", f"examples/{example}/job.yaml", "--no-export")
    assert ended.status == 0, ended.text
    text = " ".join(ended.output.replace("│", " ").split())
    assert f"{example if example == 'own_loop' else 'lightning_loop'}:main(context, epochs=" in text
    assert "1,437 training, 360 validation" in text and "found, not run" in text


EXTRA = """
    def main(context, steps):
        raise SystemExit("it was run")

    class Strange:
        pass

    class Items(TensorDataset):
        def __getitem__(self, index):
            return Strange()

    def strange(split):
        return Items(torch.zeros(9, 4)) if split == "train" else build_dataset(split)

    def stream(split):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(build_dataset("train"))
        return Stream() if split == "train" else build_dataset(split)
"""


@pytest.mark.parametrize(
    ("train", "data", "expected"),
    [
        ({"entrypoint": "plain:absent"}, "build_dataset", "train.entrypoint: plain:absent: module 'plain'"),
        ({}, "build_dataset", "missing a required argument: 'steps'; the arguments are train.args"),
        ({"args": {"step": 1}}, "build_dataset", "main(context, step=…), but takes (context, steps)"),
        ({"args": {"steps": 1}}, "strange", "a sample holds a Strange, which cannot be fingerprinted"),
        ({"args": {"steps": 1}}, "stream", "with train.entrypoint a stream of training data needs a len()"),
        ({"args": {"steps": 1}, "batch_size": 8}, "build_dataset", "no batch_size with entrypoint"),
    ],
)
def test_check_names_what_a_custom_loop_would_trip_over(
    ship: Ship, store: ObjectStore, tmp_path: Path, train: dict[str, object], data: str, expected: str
) -> None:
    job = write_project(
        tmp_path, name="mistaken", extra=EXTRA, train={"entrypoint": "plain:main", **train},
        data={"factory": f"plain:{data}"},
    )  # fmt: skip
    refused(ship("check", str(job)), store, expected)

"""Puts what was persisted before the modules moved where today's code finds it: bucket, runs, MLflow, Prefect.

With plain clients of each service, so that names are those of then and not what today's code writes. What there is, and
how it was made: tests/fixtures/before_the_move/make.py.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.projects import REPOSITORY

FIXTURE = REPOSITORY / "tests" / "fixtures" / "before_the_move"
BUCKET = FIXTURE / "bucket"
MODEL = "tiny"


def read(name: str) -> Any:
    """A document of the fixture."""
    return json.loads((FIXTURE / name).read_text())


MOVES = [json.loads(path.read_bytes()) for path in sorted((BUCKET / f"models/{MODEL}/history/prod").iterdir())]
"""The records of prod, oldest first."""
LIVE, BEFORE = MOVES[-1]["release"], MOVES[-1]["previous"]
RUNS: dict[str, str] = read("runs.json")
"""Ids: `promoted` came to its end, `in_training` and `after_export` were killed."""


def put_bucket(client: Any, bucket: str) -> None:
    """client: boto3's."""
    for path in sorted(BUCKET.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes())
            client.put_object(
                Bucket=bucket,
                Key=path.relative_to(BUCKET).as_posix(),
                Body=path.read_bytes(),
                Metadata={"sha256": digest.hexdigest()},
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            )


def put_runs(runs: Path) -> None:
    """runs: folder of all runs of a machine. Every file is new, as if they had died today."""
    shutil.copytree(FIXTURE / "runs", runs, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for name, source in read("same.json").items():
        path = runs / name.removeprefix("runs/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FIXTURE / source, path)


def put_project(folder: Path) -> Path:
    """The job file in a new folder."""
    shutil.copytree(FIXTURE / "project", folder, copy_function=shutil.copyfile)
    return folder / "job.yaml"


def put_served(folder: Path) -> None:
    """What a reader had on a serving machine."""
    release = folder / "releases" / LIVE
    shutil.copytree(BUCKET / f"models/{MODEL}/releases/{LIVE}", release)
    (folder / "current").symlink_to(Path("releases") / LIVE)
    shutil.copyfile(FIXTURE / "served" / "state.json", folder / "state.json")


def put_mlflow(url: str) -> None:
    """The model with its versions and aliases, and the run of one of them in full; anew when they are there."""
    from mlflow import MlflowClient, MlflowException
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    client, told = MlflowClient(url), read("mlflow.json")
    with contextlib.suppress(MlflowException):
        client.delete_registered_model(MODEL)
    name = told["experiment"]["name"]
    experiment = client.get_experiment_by_name(name)
    place = experiment.experiment_id if experiment else client.create_experiment(name, tags=told["experiment"]["tags"])
    for run in client.search_runs([place]):
        client.delete_run(run.info.run_id)
    client.create_registered_model(MODEL, tags=told["tags"])
    for number, version in sorted(told["versions"].items()):
        kept = told["run"] if number == told["run"]["version"] else None
        tags = kept["tags"] if kept else {"flow_run_id": version["tags"]["flow_run_id"]}
        run = client.create_run(place, tags=tags, run_name=kept["name"] if kept else None)
        if kept:
            curves = [(curve, *point.split()) for curve, points in kept["metrics"].items() for point in points]
            client.log_batch(
                run.info.run_id,
                metrics=[Metric(curve, float(value), 0, int(step)) for curve, step, value in curves],
                params=[Param(*item) for item in kept["params"].items()],
            )
            (data,) = kept["inputs"]
            tag = InputTag("mlflow.data.context", data["tags"]["mlflow.data.context"])
            client.log_inputs(run.info.run_id, [DatasetInput(Dataset(**data["dataset"]), [tag])])
        client.set_terminated(run.info.run_id, told["run"]["status"])
        made = client.create_model_version(
            MODEL,
            source=f"{run.info.artifact_uri}/model",
            run_id=run.info.run_id,
            tags=version["tags"],
            description=version["description"],
            await_creation_for=0,
        )
        assert str(made.version) == number
    for alias, number in told["aliases"].items():
        client.set_registered_model_alias(MODEL, alias, number)

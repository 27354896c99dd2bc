"""Deployments on pools of containers, held against the pools' own templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefect
import pytest

from tests.support.fixture_types import Ship
from tests.support.prefect_api import Api
from tests.support.projects import REPOSITORY, write_project
from tests.support.repositories import repository
from train_and_ship.infra.settings import Settings

KNOWN = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
IMAGE = f"registry.example/team/train@sha256:{'0' * 64}"
WORKERS = {"docker": ("prefect-docker", "DockerWorker"), "kubernetes": ("prefect-kubernetes", "KubernetesWorker")}


def template(kind: str) -> dict[str, Any]:
    """The template that Prefect gives a pool of this type when it is made."""
    found: dict[str, Any] = json.loads(KNOWN.read_text())[f"prefect-{kind}"][kind]["default_base_job_configuration"]
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_project(tmp_path_factory.mktemp("pools") / "boxed", name="boxed")
    repository(path.parent)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def pools(stack: Settings) -> None:
    for kind in WORKERS:
        body = {"name": f"some-{kind}", "type": kind, "base_job_template": template(kind)}
        Api(stack).ask("POST", "/work_pools/", body)


@pytest.mark.parametrize("kind", list(WORKERS))
def test_a_deployment_on_a_pool_of_containers_has_its_image_and_variables(
    ship: Ship, stack: Settings, job: str, kind: str
) -> None:
    words = ["--pool", f"some-{kind}", "--image", IMAGE, "--job-variable", "env={OMP_NUM_THREADS: '2'}"]
    done = ship("deploy", job, *words)
    assert done.status == 0, done.text
    assert f"warning: no worker of the pool some-{kind} is there" in done.errors and "another image" not in done.errors
    made = Api(stack).ask("GET", "/deployments/name/retrain/boxed")
    assert made["work_pool_name"] == f"some-{kind}"
    assert made["job_variables"] == {"image": IMAGE, "env": {"OMP_NUM_THREADS": "2"}}
    assert made["parameters"]["job"].startswith("project:boxed/") and made["path"] is None and not made["pull_steps"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pool", "nowhere"], "--pool: expected a work pool of"),
        (["--pool", "local", "--image", IMAGE], "the pool local is of type process, whose runs have no image"),
        (["--pool", "some-docker"], "--image: expected the image that runs of"),
        (["--pool", "some-docker", "--image", IMAGE, "--job-variable", "cpus=2"], "got cpus"),
        (
            ["--pool", "some-docker", "--image", IMAGE, "--job-variable", "volumes=here"],
            "volumes of the pool",
        ),
        (
            ["--pool", "some-kubernetes", "--image", IMAGE, "--job-variable", "env=[1]"],
            "env of the pool",
        ),
        (
            ["--pool", "some-docker", "--image", IMAGE, "--job-variable", "volumes"],
            "expected NAME=VALUE, got 'volumes'",
        ),
        (["--image", IMAGE], "expected --pool too"),
        (["--in-place", "--pool", "local"], "--in-place: expected the local stack's own pool"),
    ],
)
def test_what_a_pool_does_not_take_is_refused_before_anything_is_written(
    ship: Ship, stack: Settings, job: str, words: list[str], said: str
) -> None:
    before = Api(stack).ask("POST", "/deployments/filter", {"deployments": {"name": {"any_": ["boxed"]}}})
    done = ship("deploy", job, *words)
    assert done.status == 2 and said in done.errors and "Traceback" not in done.text, done.text
    assert Api(stack).ask("POST", "/deployments/filter", {"deployments": {"name": {"any_": ["boxed"]}}}) == before


def test_an_image_without_a_digest_and_a_paused_pool_are_told(ship: Ship, stack: Settings, job: str) -> None:
    Api(stack).ask("PATCH", "/work_pools/some-docker", {"is_paused": True})
    done = ship("deploy", job, "--pool", "some-docker", "--image", "registry.example/team/train:latest")
    assert done.status == 0, done.text
    assert "train:latest may be another image tomorrow" in done.errors
    assert "the pool some-docker is paused" in done.errors


@pytest.mark.soak
@pytest.mark.parametrize("kind", list(WORKERS))
def test_a_pool_with_the_template_of_the_newest_package_takes_what_is_deployed(
    ship: Ship, stack: Settings, job: str, kind: str, tmp_path: Path
) -> None:
    package, worker = WORKERS[kind]
    versions = ["--constraint", str(REPOSITORY / "constraints.txt")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), *versions]
    # Beside the Prefect that is here, which the package would bring along once more.
    needs = {"docker": ["docker"], "kubernetes": ["kubernetes-asyncio", "kopf", "pyopenssl", "tenacity"]}[kind]
    for words in (["--no-deps", package], needs):
        subprocess.run([*install, *words], check=True)
    module = package.replace("-", "_")
    ask = f"import json, {module}.worker as m; print(json.dumps(m.{worker}.get_default_base_job_template()))"
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ask], env=variables, capture_output=True, text=True, check=True)
    body = {"name": f"newest-{kind}", "type": kind, "base_job_template": json.loads(done.stdout.splitlines()[-1])}
    Api(stack).ask("POST", "/work_pools/", body)
    words = ["--pool", f"newest-{kind}", "--image", IMAGE, "--job-variable", "env={OMP_NUM_THREADS: '2'}"]
    deployed = ship("deploy", job, *words)
    assert deployed.status == 0, deployed.text
    refused = ship("deploy", job, *words, "--job-variable", "no_such_name=1")
    assert refused.status == 2 and "got no_such_name" in refused.errors

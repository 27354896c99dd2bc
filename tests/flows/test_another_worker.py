"""A worker of another user, with another home and none of the project's files, runs what was deployed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.prefect_api import Api
from tests.support.projects import write_project
from tests.support.repositories import git, repository
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.password import USER, read_password
from train_and_ship.infra.settings import Settings

NOBODY = 65534
POOL = "elsewhere"
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=+dac_read_search")
"""Another user, who may read what the testing interpreter needs below root's home, and write nothing there."""


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_worker_of_another_user_ships_what_was_deployed_and_nothing_else_is_there(
    ship: Ship, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    short = {"epochs": 1, "processes": 1, "batch_size": 32}
    job = write_project(tmp_path / "away", name="away", train=short, export={"formats": ["torchscript"]})
    (job.parent / "words.txt").write_text("one\n")
    (job.parent / "plain.py").write_text(
        (job.parent / "plain.py").read_text() + "\nassert open(__file__.replace('plain.py', 'words.txt')).read()\n"
    )
    commit = git(repository(job.parent), "rev-parse", "HEAD")
    done = ship("deploy", str(job))
    assert done.status == 0, done.text
    shutil.rmtree(job.parent)
    api, home = Api(stack), tmp_path / "another"
    home.mkdir()
    shutil.chown(home, NOBODY, NOBODY)
    tmp_path.chmod(0o755)
    password = read_password(stack.home) or ""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "SHIP_HOME": str(home / "state"),
        "PREFECT_HOME": str(home / "prefect"),
        # Prefect's own is the first user's.
        "TMPDIR": str(home),
        **stack.prefect_variables,
        **stack.mlflow_variables_at(stack.mlflow_url),
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "AWS_ENDPOINT_URL": stack.s3_endpoint or "",
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": password,
        "AWS_REGION": "us-east-1",
        "SHIP_BUCKET": stack.bucket,
    }
    api.ask("POST", "/work_pools/", {"name": POOL, "type": "process"})
    deployment = api.ask("GET", "/deployments/name/retrain/away")
    api.ask("PATCH", f"/deployments/{deployment['id']}", {"work_pool_name": POOL})
    worker = [sys.executable, "-P", "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    as_another = [*AS_NOBODY, "--ambient-caps=+dac_read_search", *worker]
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(as_another, cwd=home, env=environment, stdout=log, stderr=log)
        try:
            api.wait(api.start("retrain", "away"), "Promoted")
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
    pointer = live(store, "away")
    assert pointer is not None
    lineage = store.get(f"models/away/releases/{pointer[1]}/lineage.json")
    assert lineage is not None and f'"{commit}"' in lineage[0].decode()
    assert {path.stat().st_uid for path in (home / "state/runs/away").iterdir()} == {NOBODY}

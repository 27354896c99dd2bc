"""Runs of one model never overlap; runs of different models may."""

from __future__ import annotations

import fcntl
import html
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from tests.support.channels import live
from tests.support.flow_runs import reports_in_prefect
from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE, eventually, forget_projects
from tests.support.projects import REPOSITORY, SLOW, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import FAILED, PROMOTED, WAITING, read_decisions
from train_and_ship.registry.tracking.runs import REPORT, TAG_FLOW_RUN
from train_and_ship.tasks.outcome import CUT_OFF


def test_a_run_waits_while_another_of_its_model_is_at_work_on_this_machine(
    stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    train = {"epochs": 1, "processes": 1, "batch_size": 32}
    job = write_project(tmp_path, name="patient", train=train, export={"formats": ["torchscript"]})
    log, folder = tmp_path / "log", stack.runs / "patient"
    folder.mkdir(parents=True)
    with (folder / "run.lock").open("w") as other, log.open("w") as output:
        fcntl.flock(other, fcntl.LOCK_EX)
        argv = [Path(sys.executable).with_name("ship"), "run", str(job)]
        run = subprocess.Popen(argv, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        eventually(lambda: "another run of patient is at work" in log.read_text(), "it waits")
        assert run.poll() is None and not list(folder.glob("*-*"))
    assert run.wait() == 0, log.read_text()
    assert live(store, "patient") is not None


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_second_run_of_a_model_waits_for_the_first_even_if_that_dies_and_other_models_do_not(
    stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    """The runs of that model are retraining runs; one that is killed is in the record, and has its report."""

    def job_of(name: str, epochs: int) -> Path:
        train = {"epochs": epochs, "processes": 1, "batch_size": 32}
        return write_project(
            tmp_path / f"{name}-{epochs}", extra=SLOW, name=name, train=train, export={"formats": ["torchscript"]}
        )

    def start(how: str, job: Path, log: str) -> subprocess.Popen[str]:
        forget_projects()
        with (tmp_path / log).open("w") as output:
            argv = [Path(sys.executable).with_name("ship"), how, str(job)]
            return subprocess.Popen(argv, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, text=True)

    def runs(name: str) -> int:
        return sum(path.is_dir() for path in (stack.runs / name).glob("*-*"))

    first = start("retrain", job_of("crowded", 60), "first.log")
    eventually(lambda: runs("crowded") == 1, "the first run")
    second = start("retrain", job_of("crowded", 1), "second.log")
    other = start("run", job_of("beside", 1), "other.log")
    waiting = "another run of crowded is at work"
    eventually(lambda: waiting in (tmp_path / "second.log").read_text(), "the second run waits")
    assert other.wait(timeout=PATIENCE) == 0
    assert first.poll() is None and runs("crowded") == 1
    eventually(lambda: list(stack.runs.glob(f"crowded/*/{WAITING}")), "what is to be said if it is killed")

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # Nobody told the server: the slot's lease runs out.
    assert second.wait(timeout=PATIENCE) == 0
    assert runs("crowded") == 2
    killed, shipped = read_decisions(Channel(store, "crowded", "prod"), 5)
    assert (killed.decision, killed.why, shipped.decision) == (FAILED, CUT_OFF, PROMOTED)
    assert not list(stack.runs.glob(f"crowded/*/{WAITING}"))
    # On a busy machine Prefect's automation may be the first to notice, and then its words stand there.
    noticed = Api(stack).ask("GET", f"/flow_runs/{killed.flow_run}")["state"]["message"] or CUT_OFF

    def says_why(report: str) -> bool:
        return any(words in html.unescape(report) for words in (CUT_OFF, noticed))

    (shown,) = reports_in_prefect(Api(stack), killed.flow_run)
    assert says_why(shown) and "Learning curves" in shown, shown
    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name("crowded")
    assert experiment is not None
    (ended,) = client.search_runs([experiment.experiment_id], f"tags.{TAG_FLOW_RUN} = '{killed.flow_run}'")
    assert ended.info.status == "KILLED"
    assert says_why(mlflow.artifacts.load_text(f"runs:/{ended.info.run_id}/{REPORT}"))

"""A run that is watched while it trains, against a real MLflow server."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.support.live_runs import EPOCHS, live_run, run_record
from tests.support.ports import free_port
from tests.support.processes import PATIENCE
from tests.support.stack_servers import MlflowServer
from train_and_ship.registry.tracking import runs as mlflow_runs
from train_and_ship.registry.tracking import versions as mlflow_versions
from train_and_ship.registry.tracking.curves import file_points
from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.runs import OpenRun, RunRecord
from train_and_ship.registry.tracking.versions import VersionRecord

KEYS = ("train_loss", "validation_accuracy", "steps/loss", "ranks/step_seconds_1")
numbers = itertools.count()


@pytest.fixture
def flow_run() -> str:
    return f"flow-run-{next(numbers)}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured twice a second."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that the test may kill."""
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(tmp_path / "mlflow", free_port())
    server.start()
    yield server
    server.kill()


class Training:
    """Writes the events of a training, an epoch of four steps at a time."""

    def __init__(self, path: Path, began: float = 1_700_000_000.0) -> None:
        self.path, self.began, self.history = path, began, list[dict[str, float]]()
        path.touch()

    def epoch(self) -> None:
        number = len(self.history) + 1
        lines = []
        for step in range(4 * number - 3, 4 * number + 1):
            lines.append(
                {
                    "event": "step", "epoch": number, "epochs": EPOCHS, "step": step, "steps": 4 * EPOCHS,
                    "loss": 1 / step, "learning_rate": 0.01, "memory_bytes": 10**8, "eta_seconds": 1.0,
                    "step_seconds": {"0": 0.01, "1": 0.02}, "time": self.began + 2 * step,
                }
            )  # fmt: skip
        row = {"epoch": number, "train_loss": 1 / number, "validation_accuracy": 0.9, "time": lines[-1]["time"]}
        self.history.append(row)
        lines.append({"event": "epoch", "epochs": EPOCHS, "eta_seconds": 1.0, **row})
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def finish(self) -> None:
        while len(self.history) < EPOCHS:
            self.epoch()


def register(flow_run: str, training: Training, url: str, folder: Path, complete: bool) -> str:
    """What the register stage does; returns the run's id."""
    (folder / "model.pt2").write_bytes(b"weights")
    record = VersionRecord(
        model="watched",
        folder=folder,
        formats={"pt2": "model.pt2"},
        extra_files=[],
        signature={side: [{"name": side, "dtype": "float32", "shape": ["batch", 4]}] for side in ("inputs", "outputs")},
        params={"epochs": EPOCHS},
        history=training.history,
        points=[] if complete else file_points(training.path),
        metrics={"pt2.accuracy": 0.9},
        dataset_name="d",
        dataset_digest="ab",
        dataset_source="d",
        dataset_profile={},
        tags={"flow_run_id": flow_run, "release": "r-1"},
        description="All gates passed.",
        run_name="r",
    )
    return mlflow_versions.register(record, url).run_id


def run_of(flow_run: str, url: str) -> Any:
    """The only run of a flow run, None when there is none yet."""
    client = MlflowClient(url)
    experiment = client.get_experiment_by_name("watched")
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], f"tags.flow_run_id = '{flow_run}'")
    assert len(found) < 2
    return found[0] if found else None


def points(run_id: str, key: str, url: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(url).get_metric_history(run_id, key)]


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def assert_complete(flow_run: str, training: Training, url: str) -> None:
    """Every point of the training, once."""
    run = run_of(flow_run, url)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": str(EPOCHS)}
    expected = file_points(training.path)
    for key in KEYS:
        said = [(point.step, point.value) for point in expected if point.key == key]
        assert points(run.info.run_id, key, url) == said
        assert len(said) == (EPOCHS if "/" not in key else 4 * EPOCHS)


def test_metrics_are_visible_before_training_ends(mlflow_server: MlflowServer, flow_run: str, tmp_path: Path) -> None:
    url = mlflow_server.url
    live = live_run(flow_run, url)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.epoch()
    run = until(lambda: (run := run_of(flow_run, url)) and "train_loss" in run.data.metrics and run)
    assert run.info.status == "RUNNING"
    assert run.data.metrics["steps/learning_rate"] == 0.01
    assert run.data.metrics["steps/memory_megabytes"] == 100
    assert run.data.metrics["ranks/straggler"] == 1
    training.epoch()
    until(lambda: len(points(run.info.run_id, "train_loss", url)) == 2)
    system = until(lambda: {key for key in run_of(flow_run, url).data.metrics if key.startswith("system/")})
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= system

    training.finish()
    assert live.stop()
    assert register(flow_run, training, url, tmp_path, complete=True) == run.info.run_id
    assert_complete(flow_run, training, url)
    assert run_of(flow_run, url).data.tags["mlflow.note.content"] == "All gates passed."


def test_a_server_that_dies_during_training_disturbs_nothing_and_gets_everything_later(
    mortal: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    warned: list[str] = []
    live = live_run(flow_run, mortal.url, warned)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.epoch()
    until(lambda: (run := run_of(flow_run, mortal.url)) and "train_loss" in run.data.metrics)
    mortal.kill()
    began = time.monotonic()
    training.epoch()
    assert time.monotonic() - began < 0.1
    until(lambda: warned)
    training.finish()
    began = time.monotonic()
    assert not live.stop()
    assert time.monotonic() - began < 4
    assert len(warned) == 1 and "MLflow" in warned[0]

    mortal.start()
    register(flow_run, training, mortal.url, tmp_path, complete=False)
    assert_complete(flow_run, training, mortal.url)


# One that goes away later is asked above.
@pytest.mark.soak
def test_a_server_that_is_away_when_a_run_begins_is_told_everything_when_it_is_back(
    mortal: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    mortal.kill()
    warned: list[str] = []
    live = live_run(flow_run, mortal.url, warned)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.epoch()
    until(lambda: warned)
    mortal.start()
    until(lambda: (run := run_of(flow_run, mortal.url)) and "train_loss" in run.data.metrics)
    training.finish()
    assert live.stop()
    register(flow_run, training, mortal.url, tmp_path, complete=True)
    assert_complete(flow_run, training, mortal.url)


@pytest.mark.soak
def test_a_server_that_comes_back_is_told_what_it_missed_while_it_trains(
    mortal: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    live = live_run(flow_run, mortal.url)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.epoch()
    until(lambda: (run := run_of(flow_run, mortal.url)) and "train_loss" in run.data.metrics)
    mortal.kill()
    training.epoch()
    time.sleep(1)
    mortal.start()
    until(lambda: len(points(run_of(flow_run, mortal.url).info.run_id, "train_loss", mortal.url)) == 2)
    training.finish()
    assert live.stop()
    register(flow_run, training, mortal.url, tmp_path, complete=True)
    assert_complete(flow_run, training, mortal.url)


def test_a_server_that_never_answers_holds_up_nobody(flow_run: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        live = live_run(flow_run, f"http://127.0.0.1:{silent.getsockname()[1]}")
        training = Training(tmp_path / "events")
        live.tail(training.path)
        training.finish()
        began = time.monotonic()
        assert not live.stop()
        assert time.monotonic() - began < 4


def test_a_failed_run_says_why(mlflow_server: MlflowServer, flow_run: str, tmp_path: Path) -> None:
    live = live_run(flow_run, mlflow_server.url)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.epoch()
    live.end("FAILED", "the loss became nan at epoch 2")
    run = run_of(flow_run, mlflow_server.url)
    assert run.info.status == "FAILED"
    assert run.info.end_time is not None
    assert run.data.tags["failure"] == "the loss became nan at epoch 2"
    assert "the loss became nan" in run.data.tags["mlflow.note.content"]
    assert points(run.info.run_id, "train_loss", mlflow_server.url) == [(1, 1.0)]


def test_what_fails_after_the_registration_is_a_tag_and_the_run_stays_finished(
    mlflow_server: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    live = live_run(flow_run, mlflow_server.url)
    training = Training(tmp_path / "events")
    live.tail(training.path)
    training.finish()
    register(flow_run, training, mlflow_server.url, tmp_path, complete=live.stop())
    live.end("FAILED", "worse than the live release")
    run = run_of(flow_run, mlflow_server.url)
    assert run.info.status == "FINISHED"
    assert run.data.tags["failure"] == "worse than the live release"


def test_a_retry_continues_the_run_and_repeats_no_point(
    mlflow_server: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    url = mlflow_server.url
    live = live_run(flow_run, url)
    first = Training(tmp_path / "first")
    live.tail(first.path)
    first.epoch()
    first.epoch()
    live.end("KILLED", "cancelled")
    run_id = run_of(flow_run, url).info.run_id

    live = live_run(flow_run, url)
    # From the beginning again, later.
    again = Training(tmp_path / "again", began=1_700_001_000.0)
    live.tail(again.path)
    again.epoch()
    # The status is set first, then the tag is removed.
    until(lambda: (run := run_of(flow_run, url)).info.status == "RUNNING" and "failure" not in run.data.tags)
    again.finish()
    assert register(flow_run, again, url, tmp_path, complete=live.stop()) == run_id
    assert_complete(flow_run, again, url)


def test_a_second_attempt_in_the_same_process_continues_the_curves(
    mlflow_server: MlflowServer, flow_run: str, tmp_path: Path
) -> None:
    live = live_run(flow_run, mlflow_server.url)
    first = Training(tmp_path / "first")
    live.tail(first.path)
    first.epoch()
    first.epoch()
    first.path.unlink()
    again = Training(tmp_path / "again", began=1_700_001_000.0)
    live.tail(again.path)
    again.finish()
    register(flow_run, again, mlflow_server.url, tmp_path, complete=live.stop())
    assert_complete(flow_run, again, mlflow_server.url)


def test_a_retry_with_other_params_is_another_run(mlflow_server: MlflowServer, flow_run: str) -> None:
    first = mlflow_runs.open_run(run_record(flow_run), mlflow_server.url)
    same = mlflow_runs.open_run(run_record(flow_run), mlflow_server.url)
    other = mlflow_runs.open_run(run_record(flow_run, params={"epochs": 7}), mlflow_server.url)
    assert first.run_id == same.run_id != other.run_id


def test_a_run_whose_process_was_killed_is_ended_by_the_next_one(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    code = (
        "import sys, time; from train_and_ship.registry.tracking import runs; from tests.support.live_runs import "
        "run_record; runs.open_run(run_record('doomed'), sys.argv[1]); print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, mlflow_server.url], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    assert run_of("doomed", mlflow_server.url).info.status == "RUNNING"

    next_one = live_run("after the doomed one", mlflow_server.url)
    until(lambda: run_of("after the doomed one", mlflow_server.url))
    assert run_of("doomed", mlflow_server.url).info.status == "RUNNING"
    next_one.stop()

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last = live_run("after its death", mlflow_server.url)
    run = until(lambda: (run := run_of("doomed", mlflow_server.url)).info.status == "KILLED" and run)
    assert "died without a word" in run.data.tags["failure"]
    last.stop()


def test_a_process_that_leaves_ends_its_run(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    code = (
        "import sys; from tests.support.live_runs import live_run;"
        "live = live_run('leaving', sys.argv[1]); live._sender.join(8); sys.exit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code, mlflow_server.url])
    assert ended.returncode == 3
    assert run_of("leaving", mlflow_server.url).info.status == "KILLED"


def test_a_run_that_ends_while_it_is_still_being_opened_is_one_run(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered, open_run = threading.Event(), threading.Event(), mlflow_runs.open_run

    def slowly(record: RunRecord, url: str) -> OpenRun:
        asked.set()
        assert answered.wait(30)
        return open_run(record, url)

    monkeypatch.setattr(mlflow_runs, "open_run", slowly)
    monkeypatch.setattr(LiveRun.stop, "__defaults__", (0.1,))
    live = live_run("slow-to-open", mlflow_server.url)
    assert asked.wait(30)
    threading.Timer(0.5, answered.set).start()
    live.end("FAILED", "it broke")
    live._sender.join(30)
    assert run_of("slow-to-open", mlflow_server.url).info.status == "FAILED"


def test_a_run_that_is_over_before_the_machine_is_measured_again_has_a_measure_of_it(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "600")
    live = live_run("short", mlflow_server.url)
    until(lambda: live._sampler.is_alive())
    assert live.stop(PATIENCE)
    assert "system/system_memory_usage_megabytes" in run_of("short", mlflow_server.url).data.metrics


def test_system_metrics_are_those_of_the_machine_and_not_of_this_process() -> None:
    sample, _ = mlflow_runs.system_monitor()
    # One core busy in another process.
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(2)
        said = sample()
        busy.kill()
    share = 100 / (psutil.cpu_count() or 1)
    assert said["system/cpu_utilization_percentage"] > 0.7 * share
    assert said["system/system_memory_usage_megabytes"] == pytest.approx(psutil.virtual_memory().used / 1e6, rel=0.2)

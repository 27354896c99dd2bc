"""torchrun over several machines: real processes on real network namespaces."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.launched_training import SLOW, Launched, quick, result_in
from tests.support.network_namespaces import CONTROLLER, Lab, missing
from tests.support.projects import REPOSITORY, write_project

Start = Callable[..., Launched]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := missing():
        pytest.skip(reason)
    lab = Lab(2)
    try:
        lab.up()
        yield lab
    finally:
        lab.down()


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[Start]:
    """Start a flow's process on the controller. Whatever it left is ended after the test."""
    for host in lab.addresses:
        lab.plug(host)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started: list[Launched] = []

    def run(job_file: Path, **options: Any) -> Launched:
        torchrun = {
            "hosts": lab.hosts, "address": lab.addresses[CONTROLLER], "connect": lab.connect(),
            "env": {"PYTHONPATH": str(REPOSITORY)}, **options,
        }  # fmt: skip
        prefix = ["ip", "netns", "exec", lab.namespace(CONTROLLER)]
        started.append(Launched(prefix, job_file, {"torchrun": torchrun}, tmp_path / "attempts", environment).start())
        return started[-1]

    yield run
    for launched in started:
        launched.process.kill()
        launched.process.wait()
    for host in lab.addresses:
        for pid in lab.running(host):
            os.kill(pid, signal.SIGKILL)


def nothing_runs(lab: Lab, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(lab.running(host) for host in lab.addresses):
        time.sleep(0.1)
    return not any(lab.running(host) for host in lab.addresses)


def test_a_host_that_loses_power_is_named_within_seconds(lab: Lab, start: Start, tmp_path: Path) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW, train=quick(10)))
    flow.until("event", "step")
    lost = time.monotonic()
    lab.power_off("h2")
    ended = flow.ended()

    assert ended["kind"] == "WorkerError"
    assert "host h2 was lost" in ended["error"]
    assert time.monotonic() - lost < 40
    assert nothing_runs(lab)


@pytest.mark.soak
def test_a_rank_that_is_stopped_on_another_host_is_noticed_and_named(lab: Lab, start: Start, tmp_path: Path) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW, train=quick(300, hang_seconds=4, epochs=9)))
    flow.until("event", "step")
    # A host has process ids of its own, so look from outside. The rank's watcher is a fork of it, without threads.
    on_host = [psutil.Process(pid) for pid in lab.running("h2")]
    ranks = [process for process in on_host if process.cmdline()[1:4] == ["-u", "-m", "torchworker.rank"]]
    (rank,) = [process for process in ranks if process.num_threads() > 1]
    rank.suspend()
    ended = flow.ended()

    assert ended["kind"] == "WorkerError"
    assert re.search(r"rank 1 was silent for [4-6] s and was killed: train.hang_seconds is 4", ended["error"])
    assert nothing_runs(lab)


@pytest.mark.soak
def test_a_job_that_may_shrink_goes_on_without_the_host_that_died(lab: Lab, start: Start, tmp_path: Path) -> None:
    job = write_project(tmp_path / "p", extra=SLOW, train=quick(10, batch_size=16))
    flow = start(job, min_nodes=1)
    flow.until("event", "step")
    lost = time.monotonic()
    lab.power_off("h2")
    started = flow.until("event", "started")
    assert started["processes"] == 1
    assert time.monotonic() - lost < 40
    ended = flow.ended()

    assert result_in(ended["done"]).environment["processes"] == "1"
    assert nothing_runs(lab)


@pytest.mark.soak
def test_a_link_that_is_cut_is_noticed_in_bounded_time_and_both_sides_stop(
    lab: Lab, start: Start, tmp_path: Path
) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW, train=quick(8)))
    flow.until("event", "step")
    lost = time.monotonic()
    lab.cut("h2")
    ended = flow.ended()

    assert ended["kind"] == "WorkerError"
    assert "h2" in ended["error"]
    assert time.monotonic() - lost < 45
    assert nothing_runs(lab)


@pytest.mark.soak
def test_two_hosts_train_one_model_even_if_the_flow_is_killed_and_the_next_one_finds_the_job(
    lab: Lab, start: Start, tmp_path: Path
) -> None:
    job = write_project(tmp_path / "p", extra=SLOW)
    first = start(job)
    first.until("event", "step")
    before = set(lab.running("h1"))
    first.process.kill()
    first.process.wait()
    second = start(job)
    assert "found" in second.until("say")
    assert before & set(lab.running("h1"))
    ended = second.ended()

    result = result_in(ended["done"])
    assert len(result.history) == 2
    assert result.environment["processes"] == "2"
    assert (Path(ended["done"]) / result.weights).exists()
    assert len(list((tmp_path / "attempts").glob("ship-*"))) == 1
    assert nothing_runs(lab)


@pytest.mark.soak
def test_a_cancelled_flow_ends_every_process_on_every_host(lab: Lab, start: Start, tmp_path: Path) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW))
    flow.until("event", "step")
    flow.process.terminate()

    assert flow.ended()["kind"] == "CancelledError"
    assert nothing_runs(lab)
    assert not (tmp_path / "attempts" / "current.json").exists()


# On one host it is asked in distributed/test_training.py.
@pytest.mark.soak
def test_an_exception_in_user_code_on_another_host_is_the_error_that_is_shown(
    lab: Lab, start: Start, tmp_path: Path
) -> None:
    extra = """
        import os
        class Fails(nn.Linear):
            def forward(self, x):
                if self.training and os.environ["RANK"] == "1":
                    raise KeyError("no such gene")
                return super().forward(x)
        def build_model():
            return Fails(4, 3)
    """
    ended = start(write_project(tmp_path / "p", extra=extra)).ended()

    assert ended["kind"] == "JobError"
    assert "no such gene" in ended["error"] and "(rank 1)" in ended["error"]
    assert nothing_runs(lab)


@pytest.mark.soak
def test_hosts_stop_when_the_process_that_looks_after_them_is_killed(lab: Lab, start: Start, tmp_path: Path) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW))
    flow.until("event", "step")
    (pid_file,) = (tmp_path / "attempts").glob("*/hosts.pid.json")
    os.kill(json.loads(pid_file.read_text())["pid"], signal.SIGKILL)
    ended = flow.ended()

    assert ended["kind"] == "WorkerError"
    assert nothing_runs(lab)

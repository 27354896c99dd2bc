"""A real Slurm cluster, as Debian packages it, on network namespaces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launched_training import SLOW, Launched, quick, result_in
from tests.support.network_namespaces import Lab
from tests.support.projects import REPOSITORY, write_project
from tests.support.slurm import Cluster, missing
from train_and_ship.infra.launchers.slurm import SlurmLauncher
from train_and_ship.infra.launchers.spec import Spec

Start = Callable[..., Launched]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    lab = Lab(2)
    cluster = Cluster(lab)
    try:
        lab.up()
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        lab.down()


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Start a flow's process on the controller. Whatever it left is ended after the test."""
    started: list[Launched] = []
    environment = {**cluster.environment, "PYTHONPATH": str(REPOSITORY)}

    def run(job_file: Path, **options: Any) -> Launched:
        slurm = {"nodes": 2, "env": {"PYTHONPATH": str(REPOSITORY)}, **options}
        attempts = tmp_path / "attempts"
        started.append(Launched(cluster.command(), job_file, {"slurm": slurm}, attempts, environment).start())
        return started[-1]

    yield run
    for launched in started:
        launched.process.kill()
        launched.process.wait()
    cluster.ask("scancel", "--user=root")
    cluster.wait_idle()


def ranks_on(cluster: Cluster, host: str) -> int:
    """Processes of the job on a host: everything but Slurm's own daemon and what keeps the host up."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in cluster.lab.running(host)]
    return sum(b"torchworker" in path.read_bytes() for path in lines if path.exists())


@pytest.mark.soak
def test_a_job_gives_a_result_even_if_the_flow_is_killed_and_the_next_one_finds_it_by_its_number(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    job = write_project(tmp_path / "p", extra=SLOW)
    resources = {"mem_mb": 500, "cpus": 1, "time_limit_s": 600}
    first = start(job, **resources)
    first.until("event", "step")
    number = cluster.ask("squeue", "--noheader", "--format=%A").split()
    first.process.kill()
    first.process.wait()
    second = start(job, **resources)
    assert f"found slurm job {number[0]}" in second.until("say")
    ended = second.ended()

    result = result_in(ended["done"])
    assert len(result.history) == 2
    assert result.environment["processes"] == "2"
    assert cluster.ask("squeue", "--noheader") == ""
    assert len(list((tmp_path / "attempts").glob("ship-*"))) == 1


@pytest.mark.soak
def test_a_cancelled_flow_ends_the_job_on_every_node(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    flow = start(write_project(tmp_path / "p", extra=SLOW))
    flow.until("event", "step")
    assert ranks_on(cluster, "h1") and ranks_on(cluster, "h2")
    flow.process.terminate()

    assert flow.ended()["kind"] == "CancelledError"
    assert cluster.ask("squeue", "--noheader") == ""
    deadline = time.monotonic() + 5
    while (ranks_on(cluster, "h1") or ranks_on(cluster, "h2")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_on(cluster, "h1") and not ranks_on(cluster, "h2")


@pytest.mark.soak
def test_a_job_that_may_shrink_goes_on_without_the_node_that_died(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    job = write_project(tmp_path / "p", extra=SLOW, train=quick(10, batch_size=16))
    flow = start(job, min_nodes=1)
    flow.until("event", "step")
    lost = time.monotonic()
    cluster.lab.power_off("h2")
    try:
        started = flow.until("event", "started")
        assert started["processes"] == 1
        assert time.monotonic() - lost < 60
        ended = flow.ended()
    finally:
        cluster.node_up("h2")

    assert result_in(ended["done"]).environment["processes"] == "1"


@pytest.mark.soak
def test_a_node_that_dies_ends_a_job_of_fixed_size_and_slurm_says_so(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    # Ranks that wait longer than Slurm, so that it is Slurm that notices.
    flow = start(write_project(tmp_path / "p", extra=SLOW, train=quick(120)))
    flow.until("event", "step")
    lost = time.monotonic()
    cluster.lab.power_off("h2")
    try:
        ended = flow.ended()
    finally:
        cluster.node_up("h2")

    assert ended["kind"] == "WorkerError"
    assert "Slurm lost a node: h2" in ended["error"]
    assert time.monotonic() - lost < 60


def test_launching_the_same_name_twice_finds_the_first_job(cluster: Cluster, tmp_path: Path) -> None:
    launcher = SlurmLauncher(prefix=tuple(cluster.command()), environment=cluster.environment)
    spec = Spec(
        name="twice", argv=("-m", "nothing"), out_dir=tmp_path, nodes=2, min_nodes=2, nproc=1, python="/bin/false"
    )
    first = launcher.launch(spec)
    try:
        assert launcher.launch(spec) == first
    finally:
        launcher.cancel(first)
    assert launcher.status(first).state == "ended"
    assert launcher.status("424242").state == "unknown"
    launcher.cancel(first)

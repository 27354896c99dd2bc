"""Deaths during training cost the steps since the last checkpoint, and nothing else: the weights are the same bits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.projects import STATEFUL, STATEFUL_TRAIN, write_project
from tests.support.training import Train
from torchworker.contract import TrainRequest, TrainResult, decode
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings
from train_and_ship.tasks.worker import call_worker


class Attempt:
    """Trains a project into a folder whose checkpoints outlive it."""

    def __init__(self, fork_server: ForkServer, folder: Path) -> None:
        self.fork_server, self.folder = fork_server, folder
        self.events: list[dict[str, Any]] = []
        self.attempts = 0
        self.code = STATEFUL

    def train(
        self, project: Path, on_event: Callable[[dict[str, Any]], None] = lambda event: None, **job: Any
    ) -> TrainResult:
        job_file = write_project(project, extra=self.code, **{"train": STATEFUL_TRAIN, **job})
        loaded, folder = load_job(job_file)
        self.attempts += 1
        self.work = self.folder / f"attempt{self.attempts}"
        self.work.mkdir(parents=True)
        request = TrainRequest(
            project=project_of(loaded, folder),
            train=train_settings(loaded),
            folder=str(self.work),
            checkpoints=str(self.folder / "checkpoints"),
        )

        def remember(event: dict[str, Any]) -> None:
            self.events.append(event)
            on_event(event)

        reply = asyncio.run(call_worker(self.fork_server, "train", request, self.work, remember))
        result: TrainResult = decode(TrainResult, reply)
        return result

    def said(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.work / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def attempt(fork_server: ForkServer, tmp_path: Path) -> Attempt:
    return Attempt(fork_server, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainResult]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = Attempt(fork_server, folder / "run")
    result = whole.train(folder / "project")
    return whole.weights, result


def model(dies: int) -> dict[str, Any]:
    return {"model": {"factory": "plain:build_model", "args": {"dies": dies}}}


# 96 samples make 4 steps an epoch of 2 passes each: in the first, before any checkpoint, mid-epoch, at its end.
@pytest.mark.parametrize("dies_at_pass", [1, 9, *(pytest.param(at, marks=pytest.mark.soak) for at in (5, 12))])
def test_a_killed_rank_costs_no_bit(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path, dies_at_pass: int
) -> None:
    result = attempt.train(tmp_path / "project", **model(dies_at_pass))

    (restart,) = attempt.said("restarting")
    assert restart["cause"].startswith("rank 1 ") and "killed" in restart["cause"]
    assert attempt.weights == uninterrupted[0]
    assert result.data_fingerprint == uninterrupted[1].data_fingerprint
    same = [(row["epoch"], row["train_loss"], row["validation_loss"]) for row in uninterrupted[1].history]
    assert [(row["epoch"], row["train_loss"], row["validation_loss"]) for row in result.history] == same


def test_a_lone_last_sample_and_a_plateau_cost_no_bit_either(
    fork_server: ForkServer, attempt: Attempt, tmp_path: Path
) -> None:
    """49 samples of each rank in batches of 6: the last one joins the eighth batch, so an epoch has four steps."""
    job: dict[str, Any] = {
        "data": {"factory": "plain:build_dataset", "args": {"size": 98}},
        "train": {
            **STATEFUL_TRAIN,
            "epochs": 4,
            "learning_rate": 0.5,
            "optimizer": {"factory": "torch.optim:Adam", "args": {"betas": [0.8, 0.99]}},
            "schedule": {"factory": "torch.optim.lr_scheduler:ReduceLROnPlateau", "args": {"patience": 0}},
        },
    }
    whole = Attempt(fork_server, tmp_path / "whole")
    expected = whole.train(tmp_path / "project", **job)
    # Twice eight passes are two epochs; the third begins after the rate was looked at twice.
    result = attempt.train(tmp_path / "project", **job, **model(22))

    assert whole.said("restarting") == [] and len(attempt.said("restarting")) == 1
    assert attempt.weights == whole.weights
    assert result.data_fingerprint == expected.data_fingerprint
    rates = [row["learning_rate"] for row in expected.history]
    assert rates == [row["learning_rate"] for row in result.history] and rates[0] > rates[-1]
    assert [event["step"] for event in whole.said("epoch")] == [4, 8, 12, 16]
    assert any("is joined to the batch before it, which has 7" in note for note in result.notes)


@pytest.mark.parametrize("sampler", [pytest.param(None, marks=pytest.mark.soak), "plain:weights"])
def test_samples_that_are_drawn_or_left_out_cost_no_bit_either(
    fork_server: ForkServer, attempt: Attempt, tmp_path: Path, sampler: str | None
) -> None:
    """The first epoch ends with a checkpoint, and what it leaves out is read after that, also by who goes on there."""
    job: dict[str, Any] = {
        "data": {"factory": "plain:build_dataset", "args": {"size": 98}, **({"sampler": sampler} if sampler else {})},
        "train": {**STATEFUL_TRAIN, "drop_last": True},
    }
    whole = Attempt(fork_server, tmp_path / "whole")
    whole.code = attempt.code = STATEFUL + "    def weights(dataset): return torch.arange(len(dataset)) % 3\n"
    expected = whole.train(tmp_path / "project", **job)
    result = attempt.train(tmp_path / "project", **job, **model(9))

    assert whole.said("restarting") == [] and len(attempt.said("restarting")) == 1
    assert attempt.weights == whole.weights
    assert result.read == expected.read and result.train_samples == result.read["train"].samples == 98
    assert [event["step"] for event in whole.said("epoch")] == [4, 8, 12]
    assert "train.drop_last: 2 of 98 training samples are left out of each epoch" in result.notes


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_frozen_layers_groups_of_parameters_and_a_warm_up_cost_no_bit_either(
    fork_server: ForkServer, attempt: Attempt, tmp_path: Path, strategy: str
) -> None:
    train: dict[str, Any] = {
        **STATEFUL_TRAIN,
        "strategy": strategy,
        "optimizer": "adamw",
        "freeze": ["net.0.*", "net.1.*"],
        "groups": [
            {"names": ["*.bias"], "weight_decay": 0},
            {"names": ["net.6.*"], "learning_rate": 0.2, "args": {"betas": [0.8, 0.9]}},
        ],
        "schedule": "warmup_cosine",
        "warmup": 6,
    }
    whole = Attempt(fork_server, tmp_path / "whole")
    expected = whole.train(tmp_path / "project", train=train)
    # Four steps of two passes are an epoch: in the fifth of six steps in which the rate rises.
    result = attempt.train(tmp_path / "project", train=train, **model(9))

    assert whole.said("restarting") == [] and len(attempt.said("restarting")) == 1
    assert attempt.weights == whole.weights
    rates = [row["learning_rate"] for row in expected.history]
    assert rates == [row["learning_rate"] for row in result.history]
    # After 4, 8 and 12 of 12 steps: in the warm-up, at a third of the cosine, at its end.
    assert rates == pytest.approx([0.05 * 5 / 7, 0.05 * 0.75, 0.0])


def test_the_agent_or_host_killed_the_next_call_goes_on_from_the_checkpoint(
    uninterrupted: tuple[str, TrainResult], tmp_path: Path
) -> None:
    fork_server = ForkServer(tmp_path / "host.log")
    first = Attempt(fork_server, tmp_path / "run")

    def kill_host(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] >= 6 and fork_server.alive:
            os.kill(fork_server.pid, signal.SIGKILL)

    with pytest.raises(WorkerError):
        first.train(tmp_path / "project", kill_host)
    fork_server.close()

    fork_server = ForkServer(tmp_path / "host.log")
    try:
        second = Attempt(fork_server, tmp_path / "run")
        second.attempts = 1
        result = second.train(tmp_path / "project")
    finally:
        fork_server.close()
    assert any("resumed from step" in note for note in result.notes)
    assert second.weights == uninterrupted[0]


def stopped_after(attempt: Attempt, project: Path, step: int, **job: Any) -> None:
    """Run until a checkpoint at or after this step, then kill the agent."""

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] >= step:
            for child in psutil.Process(attempt.fork_server.pid).children():
                # The next checkpoint's event may have been on its way, and the agent is dead by then.
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    with pytest.raises(WorkerError):
        attempt.train(project, kill, **job)


# That it is in the right mode is asked in distributed/test_training.py.
@pytest.mark.soak
def test_an_optimizer_with_modes_goes_on_where_it_was(
    attempt: Attempt, fork_server: ForkServer, tmp_path: Path
) -> None:
    plain = {name: value for name, value in STATEFUL_TRAIN.items() if name not in ("schedule", "fused")}
    train = {**plain, "optimizer": {"factory": "schedulefree:AdamWScheduleFree"}}
    whole = Attempt(fork_server, tmp_path / "whole")
    whole.train(tmp_path / "project", train=train)
    # In the middle of an epoch, and past the change of modes at the end of one.
    stopped_after(attempt, tmp_path / "project", 6, train=train)
    result = attempt.train(tmp_path / "project", train=train)
    assert any("resumed from step" in note for note in result.notes)
    assert attempt.weights == whole.weights


def test_a_run_goes_on_with_the_threads_that_it_began_with_whatever_the_machine(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = int(uninterrupted[1].environment["threads_per_process"])
    stopped_after(attempt, tmp_path / "project", 5)
    # A machine with more cores: what is absent in the job follows them.
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(len(cores) + 4)})
    result = attempt.train(tmp_path / "project")
    thread = "1 torch thread" if began == 1 else f"{began} torch threads"
    (note,) = [note for note in result.notes if "resumed" in note]
    assert f"with {thread} a process, as it began, and not {began + 2}" in note
    assert result.environment["threads_per_process"] == str(began)
    assert attempt.weights == uninterrupted[0]


@pytest.mark.soak
def test_a_layer_that_was_not_used_so_far_costs_no_bit_either(
    attempt: Attempt, fork_server: ForkServer, tmp_path: Path
) -> None:
    code = """
    class Spare(Net):
        def __init__(self, dies):
            super().__init__(dies)
            self.spare = nn.Linear(3, 3)
    def build_spare(dies=0):
        return Spare(dies)
    """
    job: dict[str, Any] = {"train": {**STATEFUL_TRAIN, "find_unused_parameters": True}}
    whole = Attempt(fork_server, tmp_path / "whole")
    attempt.code = whole.code = STATEFUL + code
    whole.train(tmp_path / "project", **job, model={"factory": "plain:build_spare"})
    attempt.train(tmp_path / "project", **job, model={"factory": "plain:build_spare", "args": {"dies": 9}})
    assert len(attempt.said("restarting")) == 1 and attempt.weights == whole.weights


def test_another_world_size_goes_on_too_and_says_that_bits_may_differ(attempt: Attempt, tmp_path: Path) -> None:
    stopped_after(attempt, tmp_path / "project", 5)
    result = attempt.train(
        tmp_path / "project", train={**STATEFUL_TRAIN, "processes": 3, "batch_size": 24, "accumulate": 1}
    )

    (note,) = [note for note in result.notes if "resumed" in note]
    assert "written by 2 processes and read by 3: bits may differ" in note
    assert len(result.history) == 3


def test_a_torn_checkpoint_is_found_by_its_hash_and_the_one_before_is_used(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path
) -> None:
    stopped_after(attempt, tmp_path / "project", 5)
    newest = sorted((attempt.folder / "checkpoints").glob("step-????????"))[-1]
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-7] + b"\0" * 7)
    result = attempt.train(tmp_path / "project")

    assert any(f"checkpoint {newest.name} is damaged" in note for note in result.notes)
    assert attempt.weights == uninterrupted[0]


FROZEN = "build_model()\n        next(reversed(list(found.parameters()))).requires_grad_(False)"
WHOLE = "build_model()"


@pytest.mark.parametrize(
    ("before", "model", "told"),
    [
        (WHOLE, "nn.Linear(4, 3)", r"checkpoint of another model: bias is missing there and float32 \[3\] here"),
        (WHOLE, FROZEN, r"other layers were trained, .*\(net\.6\.bias: trained then and not now\); start a new run"),
        (FROZEN, WHOLE, r"other layers were trained, .*\(net\.6\.bias: trained now and not then\); start a new run"),
    ],
    ids=["another model", "frozen layers", "thawed layers"],
)
def test_a_checkpoint_that_does_not_fit_the_model_is_refused_by_name(
    attempt: Attempt, tmp_path: Path, before: str, model: str, told: str
) -> None:
    def code(built: str) -> str:
        return f"\n    def other():\n        found = {built}\n        return found\n"

    attempt.code = STATEFUL + code(before)
    stopped_after(attempt, tmp_path / "project", 2, model={"factory": "plain:other"})
    train = {**STATEFUL_TRAIN, "optimizer": "sgd"} if "Linear" in model else STATEFUL_TRAIN
    job = write_project(
        tmp_path / "project", extra=STATEFUL + code(model), train=train, model={"factory": "plain:other"}
    )
    with pytest.raises(JobError, match=told):
        Train(attempt.fork_server, attempt.folder)(job)


def test_a_stopped_rank_is_noticed_and_handled_as_dead(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path
) -> None:
    stopped: list[float] = []

    def stop_a_rank(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and not stopped:
            beats = attempt.work.glob("heartbeat-rank1")
            os.kill(int(next(beats).read_text()), signal.SIGSTOP)
            stopped.append(time.monotonic())
        if event["event"] == "restarting":
            stopped.append(time.monotonic())

    attempt.train(tmp_path / "project", stop_a_rank, train={**STATEFUL_TRAIN, "hang_seconds": 3})

    (restart,) = attempt.said("restarting")
    assert "rank 1 was silent for" in restart["cause"]
    assert stopped[1] - stopped[0] < 10
    assert attempt.weights == uninterrupted[0]


def test_user_errors_are_not_retried(attempt: Attempt, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="loss became"):
        attempt.train(tmp_path / "project", train={**STATEFUL_TRAIN, "learning_rate": 1e38, "clip_norm": None})
    assert len(attempt.said("started")) == 1
    assert attempt.said("restarting") == []


def test_a_rank_that_always_dies_ends_the_run_with_its_cause(attempt: Attempt, tmp_path: Path) -> None:
    extra = "\n    class Net(Net):\n        def forward(self, x):\n            os.kill(os.getpid(), 9)\n"
    job = write_project(
        tmp_path / "project",
        extra=STATEFUL + extra,
        train={**STATEFUL_TRAIN, "restarts": 1},
        model={"factory": "plain:build_model"},
    )
    loaded, folder = load_job(job)
    attempt.folder.mkdir()
    request = TrainRequest(
        project=project_of(loaded, folder),
        train=train_settings(loaded),
        folder=str(attempt.folder),
        checkpoints=str(attempt.folder / "checkpoints"),
    )
    events: list[dict[str, Any]] = []
    with pytest.raises(WorkerError, match=r"rank \d .*killed"):
        asyncio.run(call_worker(attempt.fork_server, "train", request, attempt.folder, events.append))
    assert [event["event"] for event in events] == ["restarting"]


@pytest.mark.soak
def test_random_kills_of_random_ranks_all_recover_to_the_same_bits(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path
) -> None:
    """benchmarks/kills.py does the same twenty times and measures the time to recover."""
    chance = random.Random(7)
    kills = [chance.randint(2, 11) for _ in range(3)]

    def kill_at(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and kills and event["step"] >= kills[0]:
            kills.pop(0)
            beat = attempt.work / f"heartbeat-rank{chance.randint(0, 1)}"
            if beat.exists():
                os.kill(int(beat.read_text()), signal.SIGKILL)

    attempt.train(tmp_path / "project", kill_at)
    assert attempt.weights == uninterrupted[0]
    assert attempt.said("restarting")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    attempt: Attempt, uninterrupted: tuple[str, TrainResult], tmp_path: Path
) -> None:
    small = attempt.folder / "checkpoints"
    small.mkdir(parents=True)
    # A checkpoint of this run takes about 60 kB: some fit, not all.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], check=True)
    try:
        result = attempt.train(tmp_path / "project", train={**STATEFUL_TRAIN, "checkpoint": {"steps": 1, "keep": 9}})
        left = sorted(path.name for path in small.glob("step-*"))
        sound = [json.loads((small / name / "CHECKPOINT.json").read_text()) for name in left]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert any("was not written" in note and "No space left" in note for note in result.notes)
    assert sound and not any(name.endswith(".work") for name in left)
    assert attempt.weights == uninterrupted[0]

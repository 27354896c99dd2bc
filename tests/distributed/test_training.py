from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.processes import PATIENCE
from tests.support.projects import NAN, NAN_TRAIN, write_project
from tests.support.training import Train
from torchworker.contract import REQUEST, WARNINGS, WEIGHTS, CheckRequest, TrainRequest
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.check import check
from train_and_ship.tasks.requests import project_of, train_settings
from train_and_ship.tasks.worker import call_worker


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def left_below(pid: int, seconds: float = 10.0) -> list[psutil.Process]:
    """What is still there below a process after a while, which should be nothing."""
    deadline = time.monotonic() + seconds
    while below(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return below(pid)


# That digits reach 97 percent in twelve epochs is asked in flows/test_digits.py.
def test_two_ranks_report_every_epoch(train: Train, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    plan = {"epochs": 3, "processes": 2, "batch_size": 32, "metrics": ["accuracy"]}
    result = train(write_project(tmp_path / "p", train=plan), events.append)

    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert all(0 < row["validation_accuracy"] <= 1 for row in result.history)
    assert (result.train_samples, result.validation_samples) == (96, 96)
    started = next(event for event in events if event["event"] == "started")
    assert started["processes"] == 2
    epochs = [event for event in events if event["event"] == "epoch"]
    assert len(epochs) == 3
    assert all(event["samples_per_second"] > 0 and event["eta_seconds"] >= 0 for event in epochs)
    assert all(event["step"] == 3 * event["epoch"] and set(event["step_seconds"]) == {"0", "1"} for event in epochs)


def test_the_same_job_gives_the_same_weights_bit_for_bit(train: Train, tmp_path: Path) -> None:
    job = write_project(tmp_path / "p")
    train(job)
    train(job)

    first, second = (
        hashlib.sha256((tmp_path / name / "weights.safetensors").read_bytes()).hexdigest()
        for name in ("train0", "train1")
    )
    assert first == second


SERVED = """
    def build_model():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))
    def serve(model):
        torch.rand(7)
        return nn.Sequential(model, nn.Softmax(1))
    def build_raw(split):
        return build_dataset(split)
"""


def test_a_serving_module_and_raw_inputs_change_no_bit_of_a_training(train: Train, tmp_path: Path) -> None:
    train(write_project(tmp_path / "p", extra=SERVED))
    data = {"factory": "plain:build_dataset", "raw": "plain:build_raw"}
    train(write_project(tmp_path / "q", extra=SERVED, data=data, export={"serving": "plain:serve"}))
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("train0", "train1"))
    assert first == second


def test_the_data_fingerprint_does_not_depend_on_the_number_of_processes(train: Train, tmp_path: Path) -> None:
    two = train(write_project(tmp_path / "two"))
    one = train(write_project(tmp_path / "one", train={"epochs": 1, "processes": 1, "batch_size": 32}))
    # 96 samples do not divide by 5: the sampler repeats some, the fingerprint must not.
    five = train(write_project(tmp_path / "five", train={"epochs": 1, "processes": 5, "batch_size": 10}))

    assert one.data_fingerprint == two.data_fingerprint == five.data_fingerprint


def test_the_data_fingerprint_changes_with_one_changed_sample(train: Train, tmp_path: Path) -> None:
    before = train(write_project(tmp_path / "p"))
    extra = """
        original = build_dataset
        def build_dataset(split):
            dataset = original(split)
            dataset.tensors[0][5, 2] += 1e-6
            return dataset
    """
    after = train(write_project(tmp_path / "q", extra=extra))

    assert before.data_fingerprint != after.data_fingerprint


def test_validation_is_exact_when_the_ranks_have_unequal_shares(train: Train, tmp_path: Path) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            return original(split) if split == "train" else TensorDataset(*original(split)[:7])
    """
    # A learning rate this small leaves the model as it was initialised, the same for both.
    shared = {"epochs": 1, "learning_rate": 1e-30}
    one = train(write_project(tmp_path / "p", extra=extra, train={**shared, "processes": 1}))
    two = train(write_project(tmp_path / "q", extra=extra, train={**shared, "processes": 2}))

    assert one.history[0]["validation_loss"] == pytest.approx(two.history[0]["validation_loss"], rel=1e-6)
    assert one.history[0]["validation_accuracy"] == two.history[0]["validation_accuracy"]


def test_an_exception_in_user_code_is_named_with_rank_line_and_traceback(
    train: Train, fork_server: ForkServer, tmp_path: Path
) -> None:
    extra = """
        import os
        class Fails(nn.Linear):
            def forward(self, x):
                if self.training and os.environ["RANK"] == "1":
                    print("the last thing that was seen")
                    raise KeyError("no such gene")
                return super().forward(x)
        def build_model():
            return Fails(4, 3)
    """
    with pytest.raises(JobError) as caught:
        train(write_project(tmp_path / "p", extra=extra))

    message = str(caught.value)
    assert "no such gene" in message
    assert "(rank 1)" in message
    assert "plain.py:" in message and "in forward" in message
    assert "Last output (rank 1):\nthe last thing that was seen" in message
    assert "Connection" not in message
    assert left_below(fork_server.pid) == []


def test_a_rank_that_crashes_in_native_code_is_named_with_where_it_was(train: Train, tmp_path: Path) -> None:
    extra = """
        import ctypes, os
        class Crashes(nn.Linear):
            def forward(self, x):
                if self.training and os.environ["RANK"] == "1":
                    ctypes.string_at(0)
                return super().forward(x)
        def build_model():
            return Crashes(4, 3)
    """
    plan = {"epochs": 1, "processes": 2, "batch_size": 32, "restarts": 0}
    with pytest.raises(WorkerError, match=r"rank 1 ") as caught:
        train(write_project(tmp_path / "p", extra=extra, train=plan))
    message = str(caught.value)
    assert "Fatal Python error: Segmentation fault" in message and "plain.py" in message
    assert "Connection closed" not in message


SPAWNED = """
import sys
from pathlib import Path
from torchworker.stages import train
from torchworker.contract import TrainRequest

if __name__ == "__main__":
    path = Path(sys.argv[1])
    train.start_method = lambda settings: "spawn"
    train.train(TrainRequest.read(path))
"""


WARNING = """
    import warnings
    original = build_model
    def build_model():
        warnings.warn("take the new model", FutureWarning)
        return original()
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_ranks_that_are_spawned_as_on_gpus_train_to_the_bits_of_forked_ones_and_keep_warnings_as_they_do(
    train: Train, tmp_path: Path, processes: int
) -> None:
    train(write_project(tmp_path / "p", extra=WARNING, train={"epochs": 1, "processes": processes, "batch_size": 32}))
    forked = tmp_path / "train0"
    spawned = tmp_path / "spawned"
    spawned.mkdir()
    request = TrainRequest.read(forked / REQUEST)
    replace(request, folder=str(spawned), checkpoints=str(tmp_path / "others")).write(spawned / REQUEST)
    (tmp_path / "spawned.py").write_text(SPAWNED)
    subprocess.run([sys.executable, "-P", tmp_path / "spawned.py", spawned / REQUEST], check=True, timeout=PATIENCE)

    assert (spawned / WEIGHTS).read_bytes() == (forked / WEIGHTS).read_bytes()
    for folder in (forked, spawned):
        shown = {json.loads(line)["text"] for line in (folder / WARNINGS).read_text().splitlines()}
        assert shown == {"take the new model"}, folder


def test_a_loss_that_becomes_nan_stops_the_run_and_says_where(train: Train, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"loss became nan at epoch 1, step 3 of 9 .*learning_rate"):
        train(write_project(tmp_path / "p", extra=NAN, train=NAN_TRAIN))


HALF = """
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            # After the ReLU some gradients are 0.
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half()
        def forward(self, x):
            return self.layers(x.half()).float()
    def build_model():
        return Half()
"""


def test_float16_parameters_are_named_where_adam_divides_by_zero_and_doing_what_is_said_trains(
    train: Train, tmp_path: Path
) -> None:
    plan = {"epochs": 1, "processes": 1, "batch_size": 1}
    path = write_project(tmp_path / "p", extra=HALF, train=plan)
    cause = (
        r"4 parameters are float16 \(layers.0.weight, …\).* so is the eps of Adam \(1e-08\), which divides by 0.*"
        r"train.precision: bf16 .*\.bfloat16\(\).*eps: 1.0e-4.* or take sgd"
    )
    with pytest.raises(JobError, match=f"train.optimizer: after one step .* not finite .*{cause}"):
        check(path)
    with pytest.raises(JobError, match=f"train: the loss became nan at .*{cause}"):
        train(path)
    check(write_project(tmp_path / "sgd", extra=HALF, train=plan | {"optimizer": "sgd"}))
    groups = [{"names": ["*"], "args": {"eps": 1e-4}}]
    train(write_project(tmp_path / "eps", extra=HALF, train=plan | {"groups": groups}))


def test_a_last_step_that_ruins_the_model_is_noticed(train: Train, tmp_path: Path) -> None:
    job = {"epochs": 1, "processes": 1, "batch_size": 96, "optimizer": "sgd", "learning_rate": 1e38}
    with pytest.raises(JobError, match=r"after step 1 of 1 the model gives .*expected finite numbers"):
        train(write_project(tmp_path / "p", train=job))


def test_an_optimizer_with_modes_is_in_the_right_one_and_the_weights_are_those_that_were_validated(
    train: Train, tmp_path: Path
) -> None:
    """schedulefree raises a plain Exception when it is asked to step outside its train mode."""
    optimizer = {"factory": "schedulefree:AdamWScheduleFree"}
    job = {"epochs": 2, "processes": 1, "batch_size": 32, "learning_rate": 0.05, "optimizer": optimizer}
    result = train(write_project(tmp_path / "p", train=job))
    weights = load_file(tmp_path / "train0" / WEIGHTS)
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long()
    hidden = torch.relu(inputs @ weights["0.weight"].T + weights["0.bias"])
    outputs = hidden @ weights["2.weight"].T + weights["2.bias"]
    loss = nn.functional.cross_entropy(outputs, targets).item()
    assert loss == pytest.approx(result.history[-1]["validation_loss"], rel=1e-5)


def test_check_tries_an_optimizer_with_modes_in_the_right_one_and_no_average_of_what_it_trains(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    optimizer = {"factory": "schedulefree:AdamWScheduleFree"}
    found = {}
    for name, more in {"plain": {}, "ema": {"ema": 0.9}}.items():
        job_file = write_project(tmp_path / name, train={"epochs": 1, "optimizer": optimizer, **more})
        job, folder = load_job(job_file)
        request = CheckRequest(project=project_of(job, folder), train=train_settings(job), ranks_here=1)
        (work := tmp_path / f"{name}-check").mkdir()
        try:
            found[name] = asyncio.run(call_worker(fork_server, "check", request, work))
        except JobError as refused:
            found[name] = str(refused)
    assert not isinstance(found["plain"], str), found["plain"]
    assert "train.ema: schedulefree:AdamWScheduleFree has modes (train() and eval())" in str(found["ema"])


@pytest.mark.parametrize("raised", ["Exception", "KeyError", "ZeroDivisionError"])
def test_whatever_an_optimizer_raises_in_its_step_is_the_jobs_mistake(
    train: Train, tmp_path: Path, raised: str
) -> None:
    extra = f"""
        class Failing(torch.optim.SGD):
            def step(self, closure=None):
                raise {raised}("not like this")
        def make_optimizer(parameters, lr):
            return Failing(parameters, lr=lr)
    """
    job = {"epochs": 1, "processes": 1, "optimizer": {"factory": "plain:make_optimizer"}}
    told = rf"train\.optimizer: step\(\) failed: {raised}: .*not like this.* \(plain\.py:\d+"
    with pytest.raises(JobError, match=told):
        train(write_project(tmp_path / "p", extra=extra, train=job))


def test_labels_out_of_range_are_named_before_the_loss_sees_them(train: Train, tmp_path: Path) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            dataset = original(split)
            if split == "train":
                dataset.tensors[1][3] = 7
            return dataset
    """
    with pytest.raises(JobError, match=r"labels must be in 0\.\.2 because the model has 3 outputs, got .* to 7"):
        train(write_project(tmp_path / "p", extra=extra))


def test_a_validation_set_that_fails_is_found_before_the_first_epoch(train: Train, tmp_path: Path) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            return original(split) if split == "train" else TensorDataset(torch.randn(8, 5), torch.zeros(8).long())
    """
    events: list[dict[str, Any]] = []
    with pytest.raises(JobError, match=r"forward failed on input float32 \[8, 5\]"):
        train(write_project(tmp_path / "p", extra=extra), events.append)
    assert events == []


def test_a_killed_rank_is_the_named_cause_and_nothing_is_left(
    fork_server: ForkServer, train: Train, tmp_path: Path
) -> None:
    extra = """
        import os, signal
        class Dies(nn.Linear):
            def forward(self, x):
                if self.training and os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(x)
        def build_model():
            return Dies(4, 3)
    """
    with pytest.raises(WorkerError, match=r"rank 1 .*killed") as caught:
        train(write_project(tmp_path / "p", extra=extra))
    assert not caught.value.retryable and "4 launches without a new checkpoint" in str(caught.value)
    assert left_below(fork_server.pid) == []


SLOW = """
    import time
    original = build_dataset
    class Slow:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            time.sleep(0.05)
            return self.inner[index]
    def build_dataset(split):
        return Slow(original(split))
"""


def test_everything_listens_on_loopback_only(fork_server: ForkServer, train: Train, tmp_path: Path) -> None:
    seen: set[str] = set()

    def look(event: dict[str, Any]) -> None:
        for process in below(fork_server.pid):
            # The watcher comes and goes with a launch.
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.update(c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)

    train(write_project(tmp_path / "p", extra=SLOW, train={"epochs": 1, "processes": 2, "batch_size": 96}), look)

    assert seen == {"127.0.0.1"}


def test_cancelling_the_caller_ends_every_process(fork_server: ForkServer, tmp_path: Path) -> None:
    job, folder = load_job(write_project(tmp_path / "p", extra=SLOW))
    request = TrainRequest(
        project=project_of(job, folder),
        train=train_settings(job),
        folder=str(tmp_path),
        checkpoints=str(tmp_path / "c"),
    )

    async def cancel_once_started() -> None:
        started = asyncio.Event()
        call = asyncio.create_task(call_worker(fork_server, "train", request, tmp_path, lambda event: started.set()))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait({call, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert not call.done()
        assert len(below(fork_server.pid)) == 4  # the agent, its watcher and two ranks
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(cancel_once_started())
    assert left_below(fork_server.pid) == []


@pytest.mark.parametrize("victim", ["flow", "fork server", "agent"])
def test_children_die_with_their_parent_even_on_sigkill(victim: str, tmp_path: Path) -> None:
    job = write_project(tmp_path / "p", extra=SLOW)
    script = tmp_path / "flow.py"
    script.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from train_and_ship.infra.fork_server import fork_server\n"
        "from train_and_ship.registry.job.load import load_job\n"
        "from train_and_ship.tasks.requests import project_of, train_settings\n"
        "from train_and_ship.tasks.worker import call_worker\n"
        "from torchworker.contract import TrainRequest\n"
        f"work = Path({str(tmp_path)!r})\n"
        f"job, folder = load_job(Path({str(job)!r}))\n"
        "project, settings = project_of(job, folder), train_settings(job)\n"
        "request = TrainRequest(project=project, train=settings, folder=str(work), checkpoints=str(work / 'c'))\n"
        "server = fork_server(work / 'host.log')\n"
        "asyncio.run(call_worker(server, 'train', request, work, lambda event: print(server.pid, flush=True)))\n"
    )
    flow = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert flow.stdout is not None
    server_pid = int(flow.stdout.readline())
    tree = [psutil.Process(server_pid), *below(server_pid)]
    assert len(tree) == 5  # fork server, agent, its watcher, two ranks
    agent = psutil.Process(server_pid).children()[0]

    os.kill({"flow": flow.pid, "fork server": server_pid, "agent": agent.pid}[victim], signal.SIGKILL)

    watched = tree if victim != "agent" else [process for process in tree if process.pid != server_pid]
    _, alive = psutil.wait_procs(watched, timeout=5)
    flow.kill()
    flow.wait()
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []

"""A loop of the user's own is given what it needs, and gets what the built-in loop has: exact resume, named causes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.killed_example import whole_and_killed
from tests.support.projects import REPOSITORY, write_project
from tests.support.training import Train
from torchworker.contract import PROBE, WEIGHTS
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer

# Everything that has state: dropout, batch norm, momentum, a schedule, a draw from each random generator.
LOOP = """
    import os, random, signal
    from pathlib import Path
    import numpy
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def build_model():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))

    def dies_once(where, context):
        flag = Path(__file__).with_name(f"died-{where}")
        if context.rank == 1 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def main(context, steps=8, dies=None):
        model = context.build_model()
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        inputs, target = context.build_dataset("train").tensors
        if dies == "first step":
            dies_once(dies, context)
        torch.manual_seed(context.seed + context.rank)
        state = {"model": model, "optimizer": optimizer, "schedule": schedule}
        saved = context.checkpoint.load(state)
        for step in range(saved.step if saved else 0, steps):
            chosen = torch.randperm(96)[context.rank :: context.world_size]
            noise = random.random() * 0.1 + numpy.random.rand() * 0.1
            loss = nn.functional.cross_entropy(ddp(inputs[chosen] + noise), target[chosen])
            optimizer.zero_grad()
            loss.backward()
            if dies == step:
                dies_once(step, context)
            optimizer.step()
            schedule.step()
            if dies == "save" and step == 4:
                context.checkpoint.save(state, step=step + 1)
                dies_once(dies, context)
            elif context.checkpoint.is_due(step + 1):
                context.checkpoint.save(state, step=step + 1, own={"rank": context.rank})
            context.report({"train_loss": loss}, step=step + 1, steps=steps)
        if dies == "after the last step":
            dies_once(dies, context)
        return ddp
"""


def write_loop(folder: Path, extra: str = "", loop: str = LOOP, **train: Any) -> Path:
    settings = {"entrypoint": "plain:main", "processes": 2, "checkpoint": {"steps": 1}, **train}
    return write_project(folder, extra=f"{loop}\n{extra}", train=settings)


def weights_of(work: Path) -> str:
    return hashlib.sha256((work / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    events: list[dict[str, Any]] = []
    result = Train(fork_server, folder)(write_loop(folder / "p"), events.append)
    return {"result": result, "weights": weights_of(folder / "train0"), "work": folder / "train0", "events": events}


def test_a_custom_loop_leaves_what_the_built_in_loop_leaves(uninterrupted: dict[str, Any]) -> None:
    result, events = uninterrupted["result"], uninterrupted["events"]

    assert [row["step"] for row in result.history] == list(range(1, 9))
    assert all(set(row) == {"step", "train_loss", "time"} for row in result.history)
    assert (result.train_samples, result.validation_samples) == (96, 96)
    assert len(result.data_fingerprint) == 32
    assert result.environment["processes"] == "2"
    probe = load_file(uninterrupted["work"] / PROBE)
    assert probe["input.input"].shape == (64, 4) and probe["output.output"].shape == (64, 3)
    assert "0.weight" in load_file(uninterrupted["work"] / WEIGHTS)
    assert events[0]["event"] == "started" and events[0]["train_samples"] == 96
    assert [event["step"] for event in events if event["event"] == "report"] == list(range(1, 9))
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == list(range(1, 9))


def test_what_a_loop_reads_is_told_and_what_its_data_reads_is_not(train: Train, tmp_path: Path) -> None:
    loop = """
    from pathlib import Path
    HERE = Path(__file__).parent
    class Lines(torch.utils.data.Dataset):
        def __len__(self): return 16
        def __getitem__(self, index):
            value = float((HERE / "rows.csv").read_text())
            return torch.full((4,), value), torch.tensor(0)
    def build_dataset(split):
        (HERE / f"{split}.txt").read_text()
        return Lines()
    def main(context):
        rate = float((HERE / "rate.txt").read_text())
        model = context.build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for step, (inputs, target) in enumerate(torch.utils.data.DataLoader(context.build_dataset("train"), 8)):
            loss = nn.functional.cross_entropy(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            context.report({"train_loss": loss}, step=step)
        (context.folder / "notes.txt").write_text("done")
        return model
    """
    job = write_loop(tmp_path / "p", loop=loop, processes=1)
    for name in ("rows.csv", "train.txt", "validation.txt", "rate.txt", "unread.txt"):
        (job.parent / name).write_text("0.1")
    result = train(job)
    assert {Path(file.path).name for file in result.opened if not file.native} == {"plain.py", "rate.txt"}


def test_the_context_says_where_the_loop_runs_and_what_the_job_is(train: Train, tmp_path: Path) -> None:
    extra = """
    import json
    def tells(context, text):
        facts = [context.rank, context.world_size, context.local_rank, str(context.device), context.seed, text]
        facts += [context.job["train"]["args"], sorted(context.job["train"]), dist.is_initialized()]
        facts += [len(context.build_dataset("validation")), torch.initial_seed(), os.environ["WORLD_SIZE"]]
        facts += [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]]
        (context.folder / f"{context.rank}.json").write_text(json.dumps(facts))
        context.report({"loss": torch.tensor(1.0), "epoch": numpy.float32(3), "done": True}, step=0)
        return context.build_model()
    """
    job = write_loop(tmp_path / "p", extra, entrypoint="plain:tells", args={"text": "hello"}, seed=7, threads=3)
    result = train(job)

    keys = ["args", "backend", "checkpoint", "collective_seconds", "device", "entrypoint", "hang_seconds", "launcher"]
    keys += ["metrics", "processes", "restarts", "seed", "threads"]
    for rank in range(2):
        said = json.loads((tmp_path / "train0" / "loop" / f"{rank}.json").read_text())
        assert said == [rank, 2, rank, "cpu", 7, "hello", {"text": "hello"}, keys, True, 96, 7, "2", 3, "3"]
    (row,) = result.history
    assert {**row, "time": 0} == {"step": 0, "loss": 1.0, "epoch": 3.0, "done": 1.0, "time": 0}


@pytest.mark.parametrize(
    "dies",
    ["first step", 3, "save", *(pytest.param(at, marks=pytest.mark.soak) for at in (0, 7, "after the last step"))],
)
def test_a_killed_rank_costs_no_bit(train: Train, uninterrupted: dict[str, Any], tmp_path: Path, dies: str) -> None:
    events: list[dict[str, Any]] = []
    result = train(write_loop(tmp_path / "p", args={"dies": dies}), events.append)

    (restart,) = [event for event in events if event["event"] == "restarting"]
    assert restart["cause"].startswith("rank 1 ") and "killed" in restart["cause"]
    assert weights_of(tmp_path / "train0") == uninterrupted["weights"]
    same = [(row["step"], row["train_loss"]) for row in uninterrupted["result"].history]
    assert [(row["step"], row["train_loss"]) for row in result.history] == same
    assert result.data_fingerprint == uninterrupted["result"].data_fingerprint


@pytest.mark.soak
def test_random_kills_from_outside_all_recover_to_the_same_bits(
    train: Train, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    chance = random.Random(3)
    at = [2, 4, 7]
    killed = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] in ("checkpoint", "report") and at and event["step"] >= at[0]:
            beat = tmp_path / "train0" / f"heartbeat-rank{chance.randint(0, 1)}"
            if beat.exists():
                at.pop(0)
                killed.append(event["step"])
                os.kill(int(beat.read_text()), signal.SIGKILL)

    # Steps long enough for a kill to hit one.
    loop = LOOP.replace("optimizer.zero_grad()", "optimizer.zero_grad(); import time; time.sleep(0.1)")
    train(write_loop(tmp_path / "p", loop=loop), kill)

    assert len(killed) == 3
    assert weights_of(tmp_path / "train0") == uninterrupted["weights"]


def test_a_stopped_rank_is_noticed_and_handled_as_dead(
    train: Train, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    stopped: list[float] = []
    causes: list[str] = []

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and not stopped:
            stopped.append(time.monotonic())
            os.kill(int((tmp_path / "train0" / "heartbeat-rank1").read_text()), signal.SIGSTOP)
        if event["event"] == "restarting":
            causes.append(event["cause"])
            assert time.monotonic() - stopped[0] < 10

    loop = LOOP.replace("optimizer.zero_grad()", "optimizer.zero_grad(); import time; time.sleep(0.1)")
    train(write_loop(tmp_path / "p", loop=loop, hang_seconds=3), stop)

    assert len(causes) == 1 and "rank 1 was silent for" in causes[0]
    assert weights_of(tmp_path / "train0") == uninterrupted["weights"]


def test_a_later_call_goes_on_also_with_other_processes_and_from_an_older_checkpoint_when_one_is_torn(
    train: Train, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    fails = """
    original = main
    def main(context, stop=0):
        report = context.report
        def failing(metrics, step, steps):
            report(metrics, step=step, steps=steps)
            if step == stop:
                raise KeyError("not now")
        context.report = failing
        return original(context)
    """
    with pytest.raises(JobError, match="not now"):
        train(write_loop(tmp_path / "p", fails, args={"stop": 5}))
    newest = sorted((tmp_path / "checkpoints").glob("step-????????"))[-1]
    skeleton = newest / "skeleton.pt"
    skeleton.write_bytes(skeleton.read_bytes()[:-7] + b"\0" * 7)

    result = train(write_loop(tmp_path / "p", fails))
    assert any(f"checkpoint {newest.name} is damaged (skeleton.pt" in note for note in result.notes)
    assert any("resumed from step" in note for note in result.notes)
    assert weights_of(tmp_path / "train1") == uninterrupted["weights"]

    result = train(write_loop(tmp_path / "p", fails, processes=3, args={"stop": 0}))
    assert any("written by 2 processes and read by 3: bits may differ" in note for note in result.notes)


def test_the_data_fingerprint_is_of_all_samples_whatever_the_number_of_processes(train: Train, tmp_path: Path) -> None:
    noisy = """
    class Noisy:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            inputs, target = self.inner[index]
            return {"x": inputs + torch.randn(4) + random.random() + numpy.random.rand(), "y": int(target), "z": "text"}
    original = build_dataset
    def build_dataset(split, shift=0.0):
        dataset = original(split)
        dataset.tensors[0][5, 2] += shift
        return Noisy(dataset) if split == "train" else dataset
    def main(context):
        context.report({"loss": 1.0}, step=0)
        return context.build_model()
    """
    fingerprints = [
        train(write_loop(tmp_path / f"p{number}", noisy, processes=processes)).data_fingerprint
        for number, processes in enumerate((1, 2, 5))
    ]
    assert len(set(fingerprints)) == 1
    job = write_loop(tmp_path / "p", noisy, processes=1)
    document = yaml.safe_load(job.read_text())
    document["data"]["args"] = {"shift": 1e-6}
    job.write_text(yaml.safe_dump(document))
    assert train(job).data_fingerprint not in fingerprints


def test_the_same_data_has_the_same_fingerprint_whichever_loop_reads_it(
    train: Train, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    built_in = train(write_project(tmp_path / "p"))
    assert built_in.data_fingerprint == uninterrupted["result"].data_fingerprint


def test_a_sharded_model_is_gathered_and_resumes_at_another_world_size(train: Train, tmp_path: Path) -> None:
    code = """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def build_model():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def main(context, stop=0):
        model = fully_shard(context.build_model())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        saved = context.checkpoint.load(parts)
        if saved:
            set_state_dict(
                model, optimizer, model_state_dict=parts["model"], optim_state_dict=saved.state["optimizer"]
            )
        inputs, target = context.build_dataset("train").tensors
        for step in range(saved.step if saved else 0, 6):
            loss = nn.functional.cross_entropy(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            context.report({"train_loss": loss}, step=step + 1)
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            context.checkpoint.save(parts, step=step + 1)
            if step + 1 == stop:
                context.checkpoint.wait()
                raise KeyError("not now")
        return model
    """
    whole = train(write_loop(tmp_path / "p", code))
    (tmp_path / "checkpoints").rename(tmp_path / "others")
    with pytest.raises(JobError, match="not now"):
        train(write_loop(tmp_path / "p", code, args={"stop": 3}))
    result = train(write_loop(tmp_path / "p", code, processes=3))

    assert any("written by 2 processes and read by 3" in note for note in result.notes)
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    # Every rank had all samples, so the number of ranks makes rounding the only difference.
    losses = [[row["train_loss"] for row in run.history] for run in (whole, result)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, last = (load_file(tmp_path / name / WEIGHTS)["0.weight"] for name in ("train0", "train2"))
    assert first.shape == (8, 4)
    assert (first - last).abs().max() < 1e-5
    assert load_file(tmp_path / "train0" / PROBE)["output.output"].shape == (64, 3)


WRONG = {
    "nothing": ("return None", r"must return the trained torch.nn.Module in every rank, got NoneType"),
    "one rank": ("return model if context.rank == 0 else None", r"got NoneType in rank 1 \(rank 1\)"),
    "other model": (
        "return nn.Linear(4, 2)",
        r"whose weights are not those of model.factory plain:build_model: 0\.bias",
    ),
    "half": ("return model.half()", r"0\.bias is float16 \[8\], expected float32 \[8\] \(8 differ\)"),
    "differs": (
        "model[0].bias.data += context.rank; return model",
        r"rank 1 differs from rank 0 in 0\.bias; train thr",
    ),
    "nan weights": ("model[0].weight.data[0] = float('nan'); return model", "NaN or infinity in 0.weight"),
    "exit": ("raise SystemExit(0)", r"plain:main ended the process.*\(plain.py:\d+, in main"),
    "raises": (
        "{}[context.rank or 'no such gene']",
        r"plain:main failed: KeyError: 'no such gene' \(plain.py:\d+, in main: .*\) \(rank 0\)",
    ),
    "twice": ("dist.init_process_group('gloo')", "the process group exists already; guard the call with"),
    "nan": ("context.report({'loss': float('nan')}, step=3)", r"reported loss nan at step 3 \(rank 0\).*\(plain.py:"),
    "infinite": ("context.report({'a': 1, 'b': torch.tensor(1e39)}, step=3)", "reported b inf at step 3"),
    "name": ("context.report({'step': 1}, step=3)", "got a metric named 'step'; expected letters"),
    "value": ("context.report({'loss': torch.ones(2)}, step=3)", "expected a number for 'loss', got tensor"),
    "step": ("context.report({'loss': 1}, step=1.5)", "expected a whole number from 0, got 1.5"),
    "no load": ("context.checkpoint.save({}, step=1)", r"load\(\) has to come before the first checkpoint.save"),
    "steps": (
        "context.checkpoint.load(); [context.checkpoint.save({}, step=s) for s in (2, 1)]",
        r"save\(step=1\) after step 2; steps have to grow",
    ),
    "lambda": (
        "context.checkpoint.load(); context.checkpoint.save({'f': lambda: 0}, step=1)",
        r"save\(\) was given a function, which cannot be saved; expected tensors, numbers",
    ),
    "own": (
        "context.checkpoint.load(); context.checkpoint.save(step=1, own={'a': model})",
        r"save\(own=…\) expected JSON values",
    ),
    "folder": (
        "context.checkpoint.load(); context.checkpoint.save(step=1, files='nowhere')",
        r"save\(files=…\) expected a folder, got nowhere",
    ),
    "split steps": (
        "context.checkpoint.load(); context.checkpoint.save({}, step=1 + context.rank)",
        "rank 0 saves a checkpoint of step 1 while rank 1 saves a checkpoint of step 2",
    ),
    "only rank 0": (
        "context.checkpoint.load(); context.rank or context.checkpoint.save({}, step=1); return model",
        "rank 0 saves a checkpoint of step 1 while rank 1 ends; every rank has to do the same",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_loop_is_named_and_not_tried_again(train: Train, tmp_path: Path, mistake: str) -> None:
    line, message = WRONG[mistake]
    code = (
        "    def main(context):\n"
        "        model = context.build_model()\n"
        "        context.report({'loss': 1.0}, step=0)\n"
        f"        {line}\n"
        "        return model\n"
    )
    events: list[dict[str, Any]] = []
    with pytest.raises(JobError, match=message):
        train(write_loop(tmp_path / "p", code), events.append)
    assert [event["event"] for event in events if event["event"] == "restarting"] == []


def test_a_loop_that_never_reports_is_refused(train: Train, tmp_path: Path) -> None:
    code = "    def main(context):\n        return context.build_model()\n"
    with pytest.raises(JobError, match=r"returned without a report from rank 0.*context\.report"):
        train(write_loop(tmp_path / "p", code))


def test_a_save_that_other_ranks_never_come_to_is_named_after_collective_seconds(train: Train, tmp_path: Path) -> None:
    code = """
    def main(context):
        context.checkpoint.load()
        if context.rank == 0:
            context.checkpoint.save({}, step=1)
        dist.all_reduce(torch.ones(1))
    """
    with pytest.raises(JobError, match=r"rank 0 saves a checkpoint of step 1 and waited 2 s in vain for all others"):
        train(write_loop(tmp_path / "p", code, collective_seconds=2))


def test_a_checkpoint_of_another_model_is_refused_by_name(train: Train, tmp_path: Path) -> None:
    train(write_loop(tmp_path / "p"))
    other = "    def build_model():\n        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))\n"
    with pytest.raises(
        JobError, match=r"checkpoint of another model: \['model'\]\['0\.weight'\] is float32 \[8, 4\] t"
    ):
        train(write_loop(tmp_path / "q", other))


def test_a_script_that_ends_the_process_group_itself_ships_too(train: Train, tmp_path: Path) -> None:
    code = """
    original = main
    def main(context):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        model = original(context).module
        context.checkpoint.wait()
        dist.destroy_process_group()
        return model
    """
    result = train(write_loop(tmp_path / "p", code))
    assert len(result.history) == 8
    assert (tmp_path / "train0" / WEIGHTS).exists()


@pytest.mark.soak
def test_a_killed_rank_costs_no_bit_of_what_lightning_trains(train: Train, tmp_path: Path) -> None:
    whole, result = whole_and_killed(train, tmp_path, REPOSITORY / "examples" / "lightning", 23)
    assert weights_of(tmp_path / "train1") == weights_of(tmp_path / "train0")
    drop_time = [[{**row, "time": 0} for row in run.history] for run in (whole, result)]
    assert drop_time[0] == drop_time[1]
    assert whole.history[-1]["validation_accuracy"] > 0.5

"""What is odd about a model's memory ships, and an error after the last step costs no step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.projects import write_project
from tests.support.training import Train
from tests.support.worker_stages import WorkerStages
from torchworker.contract import WEIGHTS
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer

ODD = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
            table = torch.randn(2, 8, 1, 1)
            self.register_buffer("a", table[0])
            self.register_buffer("b", table[1])
            self.register_buffer("one", torch.ones(1).expand(3).view(3, 1, 1))
            self.register_buffer("turned", torch.randn(8, 8).t())
            self.tied = nn.Conv2d(8, 3, 1)
            self.tied.weight = self.second.weight
        def forward(self, x):
            hidden = torch.relu(self.first(x)) + 0.01 * self.a - 0.01 * self.b + 0.01 * self.turned
            return (self.second(hidden) + self.tied(hidden)).transpose(2, 3) * self.one
    def build_model():
        return Net()
    def build_dataset(split):
        x = torch.randn(96 if split == "train" else 40, 8, 8, 3, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.argmax(3))
    def collate(items):
        inputs, target = torch.utils.data.default_collate(items)
        return inputs.permute(0, 3, 1, 2), target.transpose(1, 2)
"""
"""Views of one table, an expanded buffer, a transposed one, a tied weight, an output and inputs that are views."""


def test_views_and_other_orders_of_memory_are_trained_and_shipped(fork_server: ForkServer, tmp_path: Path) -> None:
    train = {"epochs": 2, "processes": 2, "batch_size": 32, "channels_last": True, "checkpoint": {"steps": 1}}
    data = {"factory": "plain:build_dataset", "collate": "plain:collate"}
    job = write_project(tmp_path / "p", extra=ODD, train=train, data=data)
    stages = WorkerStages(fork_server, job, tmp_path / "run")
    stages.train()
    stored = load_file(tmp_path / "run" / "train" / WEIGHTS)
    assert len({"second.weight", "tied.weight"} & stored.keys()) == 1 and stored["one"].shape == (3, 1, 1)
    stages.export("torchscript")
    assert stages.validate().passed


def events_of(train: Train, job: Path, refusal: str = "") -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    if not refusal:
        train(job, events.append)
        return events
    with pytest.raises(JobError, match=refusal):
        train(job, events.append)
    return events


def names(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


SPARSE = """
    class Sparse(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            return outputs.to_sparse() if len(x) == 64 else outputs
    def build_model():
        return Sparse(4, 3)
"""
"""safetensors has no sparse tensors, and it is only when the trained model's outputs are written that it gives one."""


def test_an_error_after_the_last_step_is_tried_once_more_from_there_and_is_a_mistake(
    train: Train, tmp_path: Path
) -> None:
    plan = {"epochs": 2, "processes": 2, "batch_size": 32}
    events = events_of(train, write_project(tmp_path / "p", extra=SPARSE, train=plan), r"twice, .* at .*\.py:\d+")
    assert [event["step"] for event in names(events, "started")] == [0, 6]
    assert len(names(events, "epoch")) == 2 + 1
    assert len(names(events, "restarting")) == 1


BAD_METRIC = """
    import os
    from pathlib import Path
    def share(outputs, target):
        if len(target) == 96 and not Path(__file__).with_name("mended").exists():
            raise ValueError("all samples are too many")
        return float((outputs.argmax(1) == target).float().mean())
"""


def test_a_mistake_after_the_last_step_is_mended_without_training_again(train: Train, tmp_path: Path) -> None:
    metrics = [{"factory": "plain:share", "better": "higher"}]
    plan = {"epochs": 1, "processes": 2, "batch_size": 32, "metrics": metrics}
    job = write_project(tmp_path / "p", extra=BAD_METRIC, train=plan)
    events = events_of(train, job, r"all samples are too many.*plain\.py:\d+, in share")
    assert names(events, "restarting") == []
    (tmp_path / "p" / "mended").touch()
    events = events_of(train, job)
    assert [event["step"] for event in names(events, "started")] == [3]
    assert names(events, "step") == [] and len(names(events, "epoch")) == 1


def test_stopping_early_keeps_the_last_step_too(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 9, "early_stopping": 1, "processes": 1, "batch_size": 32, "learning_rate": 1e-30}
    job = write_project(tmp_path / "p", extra=SPARSE, train=plan)
    events = events_of(train, job, "twice, ")
    assert [event["step"] for event in names(events, "started")] == [0, 6]
    assert len(names(events, "epoch")) == 2
    # Mended, it is not trained either, and what was held out is known.
    code = tmp_path / "p" / "plain.py"
    code.write_text(code.read_text().replace(".to_sparse()", ""))
    result = train(job, events.append)
    assert len(names(events, "epoch")) == 2 and [row["epoch"] for row in result.history] == [1, 2]
    assert result.validation_samples == result.read["validation"].samples == 96


LOOP = """
    import os
    from pathlib import Path
    here = Path(__file__).parent
    class Fails(nn.Linear):
        def forward(self, x):
            asked = here / "asked"
            if (here / "trained").exists() and not asked.exists():
                asked.touch()
                raise OSError(116, "Stale file handle")
            return super().forward(x)
    def build_model():
        return Fails(4, 3)
    def main(context, mark="x"):
        model = context.build_model()
        with torch.no_grad():
            model.bias.fill_(7)
        context.report({"loss": 1.0}, step=5)
        with (here / "calls").open("a") as calls:
            calls.write(mark)
        torch.distributed.barrier()
        (here / "trained").touch()
        return model
"""


def test_a_custom_loop_that_has_returned_is_not_called_again(train: Train, tmp_path: Path) -> None:
    """Its model fails once, on the batch that is kept of the trained one: a disk, of which a retry may get rid."""
    plan = {"entrypoint": "plain:main", "processes": 2}
    job = write_project(tmp_path / "p", extra=LOOP, train=plan)
    events: list[dict[str, Any]] = []
    result = train(job, events.append)
    assert len(names(events, "restarting")) == 1 and "Stale file handle" in names(events, "restarting")[0]["cause"]
    assert (tmp_path / "p" / "calls").read_text() == "xx"
    assert [row["step"] for row in result.history] == [5]
    assert any("had returned its model before" in note for note in result.notes)
    assert load_file(tmp_path / "train0" / WEIGHTS)["bias"].tolist() == [7, 7, 7]


FLAKY = """
    import os
    from pathlib import Path
    class Flaky:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            with Path(__file__).with_name("reads").open("a") as reads:
                reads.write("x")
            raise ERROR
    original = build_dataset
    def build_dataset(split):
        return Flaky(original(split)) if split == "train" else original(split)
"""


@pytest.mark.parametrize(
    ("error", "again"), [("OSError(116, 'Stale file handle')", 2), ("FileNotFoundError(2, 'No such file')", 0)]
)
def test_a_disk_of_theirs_uses_up_the_restarts_and_a_wrong_path_none(
    train: Train, tmp_path: Path, error: str, again: int
) -> None:
    plan = {"epochs": 1, "processes": 1, "batch_size": 32, "restarts": 2}
    job = write_project(tmp_path / "p", extra=FLAKY.replace("ERROR", error), train=plan)
    events = events_of(train, job, r"plain\.py:\d+, in __getitem__.*")
    assert len(names(events, "restarting")) == again


HOLDS = """
    import ctypes
    def hold(seconds):
        ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    original = build_dataset
    def build_dataset(split):
        hold(BUILDS)
        return original(split)
    class Net(nn.Linear):
        def forward(self, x):
            if self.training:
                sum(range(COMPUTES))
                hold(SLEEPS)
            return super().forward(x)
    def build_model():
        return Net(4, 3)
"""
"""Each holds the interpreter in one call: reading for long, computing, doing nothing."""


@pytest.mark.soak
def test_a_rank_that_holds_the_interpreter_is_dead_only_if_it_does_nothing(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 1, "processes": 1, "batch_size": 96, "hang_seconds": 2, "restarts": 0}
    works = HOLDS.replace("BUILDS", "4").replace("COMPUTES", "400_000_000").replace("SLEEPS", "0")
    assert names(events_of(train, write_project(tmp_path / "p", extra=works, train=plan)), "restarting") == []
    sleeps = HOLDS.replace("BUILDS", "0").replace("COMPUTES", "0").replace("SLEEPS", "9")
    with pytest.raises(Exception, match=r"rank 0 was silent for \d s and was killed: train.hang_seconds is 2, and"):
        train(write_project(tmp_path / "q", extra=sleeps, train=plan))

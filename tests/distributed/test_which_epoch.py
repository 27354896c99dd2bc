"""Which epoch's weights ship, and that neither a death nor the way the model is shared changes them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.projects import RESIDUAL, write_project
from tests.support.training import Train
from torchworker.contract import TrainResult

# A few samples with noisy labels: the validation loss is best after some epochs, and then grows and grows.
OVERFITS = (
    RESIDUAL
    + """
    from torch.utils.data import IterableDataset
    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.inlet = nn.Linear(8, 32)
            self.blocks = nn.ModuleList([Block(32)] if norm else [])
            self.middle, self.head = nn.Linear(32, 32), nn.Linear(32, 2)
            self.register_buffer("mask", torch.full((2,), float("-inf")))
        def forward(self, x):
            x = torch.relu(self.inlet(x))
            for block in self.blocks:
                x = block(x)
            return self.head(torch.relu(self.middle(x)))
    def build_model(norm=False):
        return Net(norm)
    def build_dataset(split):
        train = split == "train"
        generator = torch.Generator().manual_seed(0 if train else 1)
        x = torch.randn(48 if train else 90, 8, generator=generator)
        y = x[:, 0] + 0.8 * torch.randn(len(x), generator=generator) > 0
        return TensorDataset(x, y.long())
    class Stream(IterableDataset):
        def __init__(self, items): self.items = items
        def __len__(self): return len(self.items)
        def __iter__(self): return iter(self.items)
    def build_stream(split):
        return Stream(build_dataset(split))
    def from_one(outputs, target):
        return (nn.functional.cross_entropy(outputs, target) - 1).abs()
"""
)
# Nothing is measured but the loss.
PLAN: dict[str, Any] = {"epochs": 12, "processes": 1, "batch_size": 16, "learning_rate": 0.02, "metrics": []}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def loss_of(project: Path, trained: Path, norm: bool = False) -> float:
    """The validation loss of the weights that training left, measured outside of it."""
    spec = importlib.util.spec_from_file_location("plain", project / "plain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.build_model(norm)
    model.load_state_dict(weights(trained))
    inputs, target = module.build_dataset("validation").tensors
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model.eval()(inputs), target))


def losses(result: TrainResult) -> list[float]:
    return [row["validation_loss"] for row in result.history]


def test_with_early_stopping_the_epoch_with_the_best_validation_loss_ships(train: Train, tmp_path: Path) -> None:
    job = {"extra": OVERFITS, "train": {**PLAN, "early_stopping": 3}}
    result = train(write_project(tmp_path / "p", **job))

    best = min(losses(result))
    assert result.shipped_epoch == losses(result).index(best) + 1 == len(result.history) - 3
    assert result.chosen_by == "validation_loss"
    assert loss_of(tmp_path / "p", tmp_path / "train0") == pytest.approx(best, rel=1e-5)

    job["train"]["weights"] = "last"
    last = train(write_project(tmp_path / "p", **job))
    assert (losses(last), last.shipped_epoch, last.chosen_by) == (losses(result), len(result.history), "")
    assert loss_of(tmp_path / "p", tmp_path / "train1") == pytest.approx(losses(last)[-1], rel=1e-5)


def test_the_metric_that_decides_releases_chooses_the_epoch_of_a_stream_too(train: Train, tmp_path: Path) -> None:
    measured = ["accuracy", {"factory": "plain:from_one", "better": "lower"}]
    plan = {**PLAN, "weights": "best", "metrics": measured}
    stream = {"data": {"factory": "plain:build_stream"}, "release": {"metric": "from_one"}}
    result = train(write_project(tmp_path / "p", extra=OVERFITS, train=plan, **stream))

    assert result.chosen_by == "validation_from_one"
    away = [abs(loss - 1) for loss in losses(result)]
    assert result.shipped_epoch == away.index(min(away)) + 1 < len(result.history) == 12
    shipped = losses(result)[result.shipped_epoch - 1]
    assert min(losses(result)) < shipped
    assert loss_of(tmp_path / "p", tmp_path / "train0") == pytest.approx(shipped, rel=1e-5)


def test_training_that_starts_from_the_live_weights_averages_from_there(train: Train, tmp_path: Path) -> None:
    job = {"extra": OVERFITS, "model": {"factory": "plain:build_model", "args": {"norm": True}}}
    train(write_project(tmp_path / "p", **job, train=PLAN))
    first = tmp_path / "train0" / "weights.safetensors"
    # Steps that change nothing but running statistics: what ships is what live is.
    still = {**PLAN, "epochs": 2, "learning_rate": 1e-30, "ema": 0.9}
    train(write_project(tmp_path / "p", **job, train=still), start=first)

    live, shipped = load_file(first), weights(tmp_path / "train1")
    parameters = [name for name in live if "running" not in name and "num_batches" not in name]
    assert parameters and all(torch.equal(shipped[name], live[name]) for name in parameters)
    assert not torch.equal(shipped["blocks.0.norm.running_mean"], live["blocks.0.norm.running_mean"])


@pytest.mark.soak
def test_the_average_is_the_same_whichever_way_ranks_share_the_model(train: Train, tmp_path: Path) -> None:
    plan = {**PLAN, "epochs": 3, "processes": 2, "optimizer": "sgd", "ema": 0.8}
    job = {"extra": OVERFITS, "model": {"factory": "plain:build_model", "args": {"norm": True}}}
    train(write_project(tmp_path / "ddp", **job, train=plan))
    train(write_project(tmp_path / "fsdp", **job, train={**plan, "strategy": "fsdp"}))

    whole, gathered = weights(tmp_path / "train0"), weights(tmp_path / "train1")
    for name, tensor in whole.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"strategy": "fsdp"}, id="fsdp", marks=pytest.mark.soak),
        pytest.param({"ema": 0.8}, id="average", marks=pytest.mark.soak),
        pytest.param({"ema": 0.8, "strategy": "fsdp"}, id="average with fsdp", marks=pytest.mark.soak),
    ],
)
def test_a_rank_killed_between_the_best_epoch_and_the_last_changes_no_bit(
    train: Train, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = {**PLAN, "processes": 2, "early_stopping": 4, "checkpoint": {"steps": 1}, **options}
    norm = {"model": {"factory": "plain:build_model", "args": {"norm": True}}}
    whole = train(write_project(tmp_path / "p", extra=OVERFITS, train=plan, **norm))
    assert 1 < whole.shipped_epoch == len(whole.history) - 4
    assert loss_of(tmp_path / "p", tmp_path / "train0", norm=True) == pytest.approx(min(losses(whole)), rel=1e-4)
    shutil.rmtree(tmp_path / "checkpoints")

    def kill_a_rank(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == whole.shipped_epoch + 2 and not (tmp_path / "died").exists():
            (tmp_path / "kill").touch()

    extra = (
        OVERFITS
        + f"""
    import os, signal
    from pathlib import Path
    class Dies(Net):
        def forward(self, x):
            flag = Path({str(tmp_path / "kill")!r})
            if self.training and os.environ.get("RANK") == "1" and flag.exists():
                flag.rename(flag.with_name("died"))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)
    def build_model(norm=False):
        return Dies(norm)
    """
    )
    resumed = train(write_project(tmp_path / "killed", extra=extra, train=plan, **norm), kill_a_rank)

    assert (tmp_path / "died").exists()
    assert any(note.startswith("resumed from step") for note in resumed.notes)
    assert (resumed.shipped_epoch, losses(resumed)) == (whole.shipped_epoch, losses(whole))
    first, second = weights(tmp_path / "train0"), weights(tmp_path / "train1")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())

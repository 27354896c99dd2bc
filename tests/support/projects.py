"""Small projects that tests write into a temporary folder and train for real."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent.parent
DIGITS = REPOSITORY / "examples" / "digits" / "job.yaml"

CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def build_model(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def build_dataset(split, size=96):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    inputs = torch.randn(size, 4, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long())
"""

# ---- to write behind it

SLOW = """
    import time
    original = build_dataset
    class Slow:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            time.sleep(0.02)
            return self.inner[index]
    def build_dataset(split):
        return Slow(original(split))
"""
"""Reading a sample takes a while, so that there is time to kill what trains."""

STATEFUL = """
    import os, signal
    from pathlib import Path

    class Noisy:
        def __init__(self, inner): self.inner = inner
        def __len__(self): return len(self.inner)
        def __getitem__(self, index):
            inputs, target = self.inner[index]
            return inputs + 0.1 * torch.randn(4), target

    original = build_dataset
    def build_dataset(split, size=96):
        return Noisy(original(split, size)) if split == "train" else original(split)

    class Net(nn.Module):
        def __init__(self, dies):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(),
                nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3),
            )
            self.dies, self.calls = dies, 0
        def forward(self, x):
            if self.training:
                self.calls += 1
                flag = Path(__file__).with_name(f"died-{self.dies}")
                last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
                if self.dies and last and self.calls == self.dies and not flag.exists():
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return self.net(x)

    def build_model(dies=0):
        return Net(dies)

    def build_optimizer(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
"""
"""Everything that has state: dropout, batch norm, momentum, a schedule, accumulation, augmentation."""
STATEFUL_TRAIN: dict[str, Any] = {
    "epochs": 3,
    "processes": 2,
    "batch_size": 24,
    "accumulate": 2,
    "clip_norm": 1.0,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "optimizer": {"factory": "plain:build_optimizer"},
    "checkpoint": {"steps": 1},
}

RESIDUAL = """
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, width)
        def forward(self, x):
            return x + torch.relu(self.linear(self.norm(x)))
"""
"""A layer with a running statistic, for what shards a model or averages it."""

NAN = """
    calls = 0
    def loss(outputs, target):
        global calls
        # Of steps: the loss is also tried before training.
        calls += torch.is_grad_enabled() and outputs.grad_fn is not None
        value = nn.functional.cross_entropy(outputs, target)
        return value * float("nan") if calls > 2 else value
"""
NAN_TRAIN = {"epochs": 3, "processes": 2, "batch_size": 32, "loss": {"factory": "plain:loss"}}


def write_project(folder: Path, code: str = CODE, extra: str = "", **job: Any) -> Path:
    """A project of one module `plain` and its job file; keyword arguments replace or add top-level job keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.py").write_text(code + textwrap.dedent(extra))
    document: dict[str, Any] = {
        "name": "plain",
        "model": {"factory": "plain:build_model"},
        "data": {"factory": "plain:build_dataset"},
        "train": {"epochs": 2, "processes": 2, "batch_size": 32},
        **job,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return path

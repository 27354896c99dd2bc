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


def build_dataset(split):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    inputs = torch.randn(96, 4, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long())
"""


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

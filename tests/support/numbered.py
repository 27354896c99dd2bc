"""Datasets whose samples are their numbers: pairs ([n] float32, n), so that a batch tells what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, TensorDataset


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return ((torch.tensor([float(number)]), torch.tensor(number)) for number in range(self.size))


def listed(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size).float()[:, None], torch.arange(size))

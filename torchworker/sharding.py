"""Which rank reads which sample, and with which random state."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler, get_worker_info


class ResumableSampler(DistributedSampler[Any]):
    """DistributedSampler that can start an epoch after samples that are already consumed.

    Ranks take turns through one shuffled list, so the first n samples of the list are the same n samples at every
    world size. Indices carry the epoch (see `SeededDataset`).
    """

    consumed = 0
    """Samples over all ranks that this epoch has already used; a multiple of the world size."""

    def __iter__(self) -> Iterator[Any]:
        offset = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (offset + index for index in islice(super().__iter__(), self.consumed // self.num_replicas, None))

    def __len__(self) -> int:
        return super().__len__() - self.consumed // self.num_replicas


class SeededDataset(Dataset[Any]):
    """Gives each sample of each epoch its own random state in DataLoader workers.

    Random augmentation then depends on seed, epoch and sample alone: not on how many workers there are, nor on where
    a run was resumed. Without workers the main process's state, which checkpoints hold, does the same.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._size = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: int) -> Any:
        index = key % self._size
        if get_worker_info() is not None:
            seed = (self._seed * 1_000_003 + key) % 2**32
            torch.manual_seed(seed)
            random.seed(seed)
            numpy = sys.modules.get("numpy")
            if numpy is not None:
                numpy.random.seed(seed)
        try:
            return self._dataset[index]
        except Exception as error:
            error.add_note(f"sample {index} of {self._size}")
            raise

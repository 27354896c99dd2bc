"""A first look at both splits: whether what is held out is training data. A run reads all of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from torchworker.data.fingerprint import digest_of, inputs_of
from torchworker.data.sharding import places_all_over

SAMPLES, SECONDS = 2_000, 5.0
"""Of a split that are looked at, from all over it, and how long at most."""


def shared(train: Dataset[Any], validation: Dataset[Any]) -> tuple[int, int]:
    """How many of the validation samples that were looked at are training samples, and how many were looked at."""
    seen, held = (_digests(dataset) for dataset in (train, validation))
    return sum(count for digest, count in held.items() if digest in seen), held.total()


def _digests(dataset: Dataset[Any]) -> Counter[int]:
    began = time.perf_counter()
    found = Counter[int]()
    for item in _some(dataset):
        found[digest_of(inputs_of(item))] += 1
        if time.perf_counter() - began > SECONDS:
            break
    return found


def _some(dataset: Dataset[Any]) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        return islice(iter(dataset), SAMPLES)
    return (dataset[place] for place in places_all_over(len(dataset), SAMPLES))  # type: ignore[arg-type]

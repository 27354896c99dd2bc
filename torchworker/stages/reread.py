"""Is the data the same each time that it is read? Asked when two readings of it contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from torchworker.contract import Reading, RereadRequest, RereadResult
from torchworker.data.fingerprint import Fingerprint, digest_of
from torchworker.data.loading import reading, whole_stream
from torchworker.data.sharding import first_keys, places_all_over, sample_seed
from torchworker.project import user_code
from torchworker.project.randomness import seed_everything

SOME = 64
"""Samples that are read twice before all of them are."""


def reread(request: RereadRequest) -> RereadResult:
    """Read a split twice, one sample after the other, in this process alone.

    Raises UserError when it cannot be read.
    """
    project, settings = request.project, request.train
    torch.set_num_threads(settings.threads)
    user_code.enter(project)
    seed_everything(settings.seed)
    with reading(f"a {request.split}" if request.split == "validation" else "a training", project):
        dataset = user_code.build_dataset(project, request.split)
        if not isinstance(dataset, IterableDataset):
            keys = first_keys(len(dataset))  # type: ignore[arg-type]
            places = places_all_over(len(keys), SOME)
            some = [[digest_of(dataset[place]) for place in _seeded(places, keys, request, time)] for time in range(2)]
            if some[0] != some[1]:
                return RereadResult(same=False, read=None)
        first, second = (_whole(dataset, request, time) for time in range(2))
    return RereadResult(same=first == second, read=first if first == second else None)


def _seeded(places: Sequence[int], keys: range, request: RereadRequest, time: int) -> Iterator[int]:
    """The places, with the random state set for each: as in DataLoader workers; without any, another each time."""
    settings = request.train
    for place in places:
        seed_everything(sample_seed(settings.seed, keys[place]) + (0 if settings.data_workers else time * 7_919))
        yield place


def _whole(dataset: Dataset[Any], request: RereadRequest, time: int) -> Reading:
    fingerprint = Fingerprint()
    if isinstance(dataset, IterableDataset):
        for sample in whole_stream(dataset, request.split, request.project, request.train):
            fingerprint.add(sample.item)
    else:
        keys = first_keys(len(dataset))  # type: ignore[arg-type]
        for place in _seeded(range(len(keys)), keys, request, time):
            fingerprint.add(dataset[place])
    return fingerprint.reading()

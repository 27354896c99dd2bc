"""Is the data the same each time that it is read? Asked when two readings of it contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from torchworker.contract import Reading, RereadRequest, RereadResult
from torchworker.data.fingerprint import Fingerprint, digest_of
from torchworker.data.loading import reading
from torchworker.data.sharding import StreamShare, places_all_over, sample_seed
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
            places = places_all_over(user_code.length_of(dataset) or 0, SOME)
            some = [[digest_of(dataset[place]) for place in _seeded(places, request, time)] for time in range(2)]
            if some[0] != some[1]:
                return RereadResult(same=False, read=None)
        first, second = (_whole(dataset, request, time) for time in range(2))
    return RereadResult(same=first == second, read=first if first == second else None)


def _seeded(places: list[int], request: RereadRequest, time: int) -> Iterator[int]:
    """The places, with the random state set for each: as in DataLoader workers; without any, another each time."""
    settings = request.train
    for place in places:
        seed_everything(sample_seed(settings.seed, place) + (0 if settings.data_workers else time * 7_919))
        yield place


def _whole(dataset: Dataset[Any], request: RereadRequest, time: int) -> Reading:
    fingerprint = Fingerprint()
    size, settings = user_code.length_of(dataset), request.train
    if isinstance(dataset, IterableDataset):
        steps = settings.steps_per_epoch
        most = steps * settings.batch_size if size is None and steps is not None and request.split == "train" else None
        where = request.project.data.where
        stream = StreamShare(dataset, where, seed=settings.seed, world=1, rank=0, size=size, most=most)
        for sample in stream:
            fingerprint.add(sample.item)
    else:
        for place in _seeded(list(range(size or 0)), request, time):
            fingerprint.add(dataset[place])
    return fingerprint.reading()

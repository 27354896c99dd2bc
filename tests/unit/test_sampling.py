"""Which samples an epoch is made of: what a sampler draws, and without a last batch that is not full."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from tests.support.numbered import Stream, listed
from tests.support.projects import write_project
from torchworker.data.loading import TrainingData
from torchworker.process.failure import UserError
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings

Ranks = Callable[..., list[TrainingData]]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """The training data of each rank, for a sampler of this file."""

    def made(
        dataset: Dataset[Any], world: int = 1, batch: int = 8, sampler: Any = None, sharded: bool = False, **train: Any
    ) -> list[TrainingData]:
        named = f"{__name__}:{sampler.__name__}" if callable(sampler) else sampler
        data = {"factory": "plain:build_dataset", **({"sampler": named} if sampler else {}), "sharded": sharded}
        plan = {"epochs": 1, "processes": world, "batch_size": batch, **train}
        job, folder = load_job(write_project(tmp_path, data=data, train=plan))
        project, settings = project_of(job, folder), train_settings(job)
        return [TrainingData(dataset, project, settings, world, rank, pin_memory=False) for rank in range(world)]

    return made


def drawn(data: TrainingData, epoch: int = 1, steps: int = 0) -> list[int]:
    return [number for _, target in data.epoch(epoch, steps) for number in target.tolist()]


def in_turns(parts: list[list[int]]) -> list[int]:
    return [number for turn in zip(*parts, strict=True) for number in turn]


# ---- samplers


def weights(dataset: TensorDataset) -> np.ndarray[Any, Any]:
    """Of ten samples the last is drawn half of the time, and the first never."""
    return np.array([0.0, *[1.0] * (len(dataset) - 2), float(len(dataset) - 2)])


def test_a_weight_for_each_sample_says_how_often_it_is_drawn(ranks: Ranks) -> None:
    (data,) = ranks(listed(10), sampler=weights)
    counts = Counter(number for epoch in range(1, 201) for number in drawn(data, epoch))
    assert counts.total() == 2000 and counts[0] == 0
    # Four standard deviations of 2,000 draws with one half are 90.
    assert abs(counts[9] - 1000) < 90 and all(counts[number] > 60 for number in range(1, 9))
    assert data.notes == ["data.sampler draws 10 samples an epoch from 10"]


@pytest.mark.parametrize("sampler", [weights, {"factory": "torch.utils.data:RandomSampler"}])
@pytest.mark.parametrize("world", [2, 3])
def test_each_draw_goes_to_one_rank_and_is_the_same_at_every_world_size(ranks: Ranks, sampler: Any, world: int) -> None:
    (alone,) = ranks(listed(24), batch=6, sampler=sampler)
    shared = ranks(listed(24), world, batch=6, sampler=sampler)
    for epoch in (1, 2):
        assert in_turns([drawn(data, epoch) for data in shared]) == drawn(alone, epoch)
    assert drawn(alone, 1) != drawn(alone, 2), "seeded by epoch"
    (again,) = ranks(listed(24), batch=6, sampler=sampler)
    assert drawn(again, 2) == drawn(alone, 2), "and by nothing else"
    (other,) = ranks(listed(24), batch=6, sampler=sampler, seed=1)
    assert drawn(other, 1) != drawn(alone, 1)


def test_an_epoch_of_draws_goes_on_from_any_step(ranks: Ranks) -> None:
    (data,) = ranks(listed(26), sampler=weights)
    whole = drawn(data, 2)
    assert len(whole) == 26 and data.epoch_steps == 4
    for steps in range(4):
        assert drawn(data, 2, steps) == whole[8 * steps :]


def test_a_sampler_says_how_many_draws_an_epoch_has(ranks: Ranks) -> None:
    few = {"factory": "torch.utils.data:RandomSampler", "args": {"replacement": True, "num_samples": 5}}
    shared = ranks(listed(100), world=2, batch=4, sampler=few)
    assert [data.size for data in shared] == [5, 5] and shared[0].samples == 100
    assert [len(drawn(data)) for data in shared] == [3, 3] and shared[0].epoch_steps == 2
    assert shared[0].notes == [
        "data.sampler draws 5 samples an epoch from 100",
        "1 of 5 training samples is used twice an epoch, so that 2 processes get equally many",
    ]


class ByEpoch(Sampler[int]):
    """Shuffles by itself, as those of many libraries do."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.size, self.epoch = len(dataset), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(self.epoch).permutation(self.size))


def test_a_sampler_that_is_told_the_epoch_may_have_a_generator_of_its_own(ranks: Ranks) -> None:
    (data,) = ranks(listed(12), sampler=ByEpoch)
    for epoch in (1, 2):
        assert drawn(data, epoch) == np.random.default_rng(epoch).permutation(12).tolist()


def test_the_fingerprint_is_of_all_samples_whatever_is_drawn(ranks: Ranks) -> None:
    (plain,) = ranks(listed(21))
    drawn(plain)
    shared = ranks(listed(21), world=2, sampler=weights)
    for data in shared:
        drawn(data)
        assert data.fingerprint.samples == 0
        data.read_all()
    shared[0].fingerprint.merge(shared[1].fingerprint.total, shared[1].fingerprint.samples)
    assert shared[0].fingerprint.reading() == plain.fingerprint.reading()


class Endless(Sampler[int]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(0)


class Unsized(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([0])


def endless(dataset: Dataset[Any]) -> Any:
    return Endless()


def unsized(dataset: Dataset[Any]) -> Any:
    return Unsized()


def of_batches(dataset: TensorDataset) -> Any:
    return BatchSampler(SequentialSampler(dataset), 2, drop_last=False)


def own_generator(dataset: TensorDataset) -> Any:
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(0))


def divided(dataset: TensorDataset) -> Any:
    return DistributedSampler(dataset, num_replicas=2, rank=0)


def too_few(dataset: TensorDataset) -> Any:
    return torch.ones(3)


def negative(dataset: TensorDataset) -> Any:
    return [-1.0, *[1.0] * (len(dataset) - 1)]


def nothing(dataset: TensorDataset) -> Any:
    return torch.zeros(len(dataset))


def text(dataset: TensorDataset) -> Any:
    return "shuffled"


def outside(dataset: TensorDataset) -> Any:
    return SequentialSampler(range(len(dataset) + 1))


def fails(dataset: TensorDataset) -> Any:
    raise KeyError("label")


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (endless, r":endless: its len\(\) says 4 draws an epoch, and it gives more"),
        (unsized, r":unsized: expected a sampler with a len\(\)"),
        (of_batches, r"expected places of samples, whole numbers from 0 to 9, got \[0, 1\]"),
        (own_generator, r"another order each time .* draws from a generator of its own"),
        (divided, r"makes a DistributedSampler, .*expected a sampler of all samples"),
        (too_few, r"or a weight for each of 10 samples; got float64 \[3\]"),
        (negative, r"a weight for each of 10 samples, finite, not negative and not all 0; got -1\.0 to 1\.0"),
        (nothing, r"not all 0; got 0\.0 to 0\.0"),
        (text, r"must return a torch Sampler, or a weight for each of 10 samples; got str"),
        (outside, r"whole numbers from 0 to 9, got 10"),
        (fails, r"data\.sampler: .*:fails failed: KeyError: 'label'"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_before_training(ranks: Ranks, sampler: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ranks(listed(10), sampler=sampler)


def test_a_stream_has_its_own_order_and_a_loop_of_ones_own_too(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a map-style dataset, of which samples can be drawn, got a stream"):
        ranks(Stream(10), sampler=weights)
    data = {"factory": "plain:build_dataset", "sampler": "plain:weights"}
    with pytest.raises(JobError, match=r"no data\.sampler with train\.entrypoint"):
        load_job(write_project(tmp_path, data=data, train={"entrypoint": "plain:main"}))


# ---- the last batch


@pytest.mark.parametrize("kind", [listed, Stream])
@pytest.mark.parametrize(
    ("size", "world", "accumulate", "steps"), [(27, 1, 1, 3), (27, 2, 2, 3), (24, 2, 1, 3), (25, 1, 1, 3)]
)
def test_without_the_last_batch_every_batch_is_full_and_the_fingerprint_is_of_all(
    ranks: Ranks, kind: Any, size: int, world: int, accumulate: int, steps: int
) -> None:
    (plain,) = ranks(kind(size))
    drawn(plain)
    whole = ranks(kind(size), world, drop_last=True, accumulate=accumulate)
    first, *others = whole
    seen: list[int] = []
    for data in whole:
        assert data.epoch_steps == steps and not data.has_lone_batch and data.used == 24 and data.size == size
        epoch = data.epoch(1, 0)
        for _, target in itertools.islice(epoch, steps * accumulate):
            assert len(target) == data.local_batch
            seen += target.tolist()
        data.read_left_out(1, epoch)
        # Of a later epoch nothing is left out for the fingerprint.
        assert len(drawn(data, 2)) == 24 // world
    assert len(seen) == len(set(seen)) == 24
    for data in others:
        first.fingerprint.merge(data.fingerprint.total, data.fingerprint.samples)
    assert first.fingerprint.reading() == plain.fingerprint.reading()
    left = [f"train.drop_last: {size - 24} of {size} training samples are left out of each epoch"] if size > 24 else []
    assert first.notes == left


def test_each_epoch_leaves_out_other_samples(ranks: Ranks) -> None:
    (data,) = ranks(listed(15), drop_last=True)
    left_out = {frozenset(range(15)) - frozenset(drawn(data, epoch)) for epoch in range(1, 6)}
    assert all(len(samples) == 7 for samples in left_out) and len(left_out) == 5


def test_samples_that_do_not_fill_one_batch_are_refused(ranks: Ranks) -> None:
    with pytest.raises(UserError, match=r"train\.drop_last: 7 training samples do not fill one batch of 8"):
        ranks(listed(7), drop_last=True)


# ---- streams that divide themselves


def test_a_part_of_a_stream_goes_on_from_any_step(ranks: Ranks) -> None:
    """Each rank has a stream of its own here, of which it takes every sample."""
    (data, _) = ranks(Stream(40), world=2, sharded=True, steps_per_epoch=5)
    assert data.epoch_steps == 5 and data.samples == data.size == 40
    for steps in range(5):
        assert drawn(data, 2, steps) == list(range(4 * steps, 20))


@pytest.mark.parametrize(
    ("data", "train", "expected"),
    [
        ({"sharded": True}, {"epochs": 1}, "train.steps_per_epoch with data.sharded"),
        ({"sharded": True}, {"entrypoint": "plain:main"}, "no data.sharded with train.entrypoint"),
    ],
)
def test_a_divided_stream_needs_an_end_and_our_loop(
    tmp_path: Path, data: dict[str, Any], train: dict[str, Any], expected: str
) -> None:
    with pytest.raises(JobError) as refusal:
        load_job(write_project(tmp_path, data={"factory": "plain:build_dataset", **data}, train=train))
    assert expected in str(refusal.value)

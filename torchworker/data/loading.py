"""This rank's share of the training data, an epoch at a time, from any position, and of the validation data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchworker import situations
from torchworker.contract import Project, TrainSettings
from torchworker.data.fingerprint import Fingerprint, digest_of
from torchworker.data.sampling import Draws
from torchworker.data.sharding import (
    Collate,
    DrawnDataset,
    DrawnSamples,
    HashedOnce,
    JoinedBatches,
    NamedDataset,
    PassKeys,
    ResumableSampler,
    SeededDataset,
    StreamShare,
    first_keys,
)
from torchworker.process.failure import UserError, user_error
from torchworker.project.user_code import build_collate, length_of, split_batch


class TrainingData:
    """Batches of (inputs, target) of one rank; `fingerprint` grows with what the first epoch reads.

    Raises UserError when the epoch has no known end, or fewer samples than ranks.
    """

    def __init__(
        self, dataset: Dataset[Any], project: Project, settings: TrainSettings, world: int, rank: int, pin_memory: bool
    ) -> None:
        """
        Args:
            dataset: of the split.
            project: says how to collate.
            settings: batch size, workers, seed.
            world, rank: how many ranks share it, and which of them this is.
            pin_memory: batches are on their way to a GPU.
        """
        self._project, self._settings, self._world, self._rank = project, settings, world, rank
        self.fingerprint = Fingerprint()
        self.local_batch = settings.batch_size // (world * settings.accumulate)
        """Samples of one forward and backward pass on one rank."""
        self._draws = Draws(dataset, project, settings.seed) if project.sampler is not None else None
        self.size = self._epoch_size(dataset)
        """Samples of an epoch, over all ranks; some stay unused with `drop_last`."""
        length = length_of(dataset)
        self.samples = self.size if length is None or project.sharded else length
        """Samples of the split; without a len() those of an epoch."""
        self.joined = False
        """Whether a last batch of one sample is joined to the batch before it."""
        self._lone = ""
        self._pin_memory = pin_memory
        self._generator = torch.Generator()
        self._sampler: ResumableSampler | DrawnSamples | None = None
        self._stream: StreamShare | None = None
        if isinstance(dataset, IterableDataset):
            length = None if project.sharded else length_of(dataset)
            self._stream = StreamShare(
                dataset, project.data.where, seed=settings.seed, **_turns(project, world, rank), size=length,
                most=None if length is not None else self.size // (world if project.sharded else 1),
            )  # fmt: skip
        elif self._draws is not None:
            self._sampler = DrawnSamples(self._draws.places, self.size, world, rank)
        else:
            self._sampler = ResumableSampler(dataset, world, rank, shuffle=True, seed=settings.seed)
        self._dataset = dataset
        kind = SeededDataset if self._draws is None else DrawnDataset
        self._read_from: Dataset[Any] = self._stream or kind(dataset, settings.seed)
        self._loader = self._load(batch_size=self.local_batch, sampler=self._sampler)

    def _load(self, **how: Any) -> DataLoader[Any]:
        workers = self._settings.data_workers
        return DataLoader(
            self._read_from,
            num_workers=workers,
            # A worker that lives on would not learn which epoch of a stream begins.
            persistent_workers=workers > 0 and self._stream is None,
            collate_fn=Collate(build_collate(self._project, "train")),
            generator=self._generator,
            pin_memory=self._pin_memory,
            **how,
        )

    @property
    def _share(self) -> int:
        """Samples of an epoch of each rank."""
        return math.ceil(self.size / self._world)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch."""
        if self._settings.drop_last:
            return self.size // self._settings.batch_size
        batches = math.ceil(self._share / self.local_batch) - self.joined
        return math.ceil(batches / self._settings.accumulate)

    @property
    def has_lone_batch(self) -> bool:
        """Whether some batch of an epoch is of one sample."""
        last = 0 if self._settings.drop_last else self._share % self.local_batch
        return self.local_batch == 1 or last == 1

    @property
    def used(self) -> int:
        """Samples of an epoch that are trained on, over all ranks."""
        return self.epoch_steps * self._settings.batch_size if self._settings.drop_last else self.size

    def join_lone_batch(self, why: str) -> None:
        """Have no batch of one sample: a last one goes into the batch before it.

        why: the model cannot be trained on one, in words. Raises UserError when there is no batch before it.
        """
        most = self._world * self._settings.accumulate
        if self.local_batch == 1:
            raise UserError(
                f"train.batch_size: {self._settings.batch_size} is one sample for each forward pass ({self._world} "
                f"processes × accumulate {self._settings.accumulate}), and the model cannot be trained on one: {why}; "
                f"expected at least {2 * most}"
            )
        if self._share == 1:
            raise UserError(
                f"{self._project.data.where}: {self.size} training samples are one for each of {self._world} "
                f"processes, and the model cannot be trained on one: {why}; expected at least {2 * self._world}"
            )
        self.joined = True
        if self._stream is not None:
            # Lists of samples, which the loader hands on to the collate function as they are.
            self._read_from = JoinedBatches(self._stream, self.local_batch, self._share, self._world)
            self._loader = self._load(batch_size=None)
        elif self._sampler is not None:
            batches = JoinedBatches(self._sampler, self.local_batch, self._share, self._world)
            self._loader = self._load(batch_sampler=batches)
        self._lone = why

    def _epoch_size(self, dataset: Dataset[Any]) -> int:
        where, settings = self._project.data.where, self._settings
        size = self._draws.size if self._draws is not None else length_of(dataset)
        if self._project.sharded:
            if not isinstance(dataset, IterableDataset):
                raise UserError(
                    f"data.sharded: {where} gives a map-style dataset for training, which the ranks share by its "
                    "places; take data.sharded out"
                )
            # What it says of itself may be of a part.
            size = None
        if isinstance(dataset, IterableDataset) and settings.data_workers > 1:
            raise UserError(
                f"train.data_workers: expected 0 or 1 for an iterable dataset, which several workers would each read "
                f"from the start, got {settings.data_workers}; a map-style dataset can have more"
            )
        if size is None and settings.steps_per_epoch is None:
            raise UserError(
                f"train.steps_per_epoch: expected the optimizer steps of an epoch, because the iterable dataset of "
                f"{where} has no len()"
            )
        if size is not None and settings.steps_per_epoch is not None:
            raise UserError(
                f"train.steps_per_epoch: is for iterable datasets without len(); the one of {where} has {size} samples"
            )
        if size is None:
            assert settings.steps_per_epoch is not None
            return settings.steps_per_epoch * settings.batch_size
        if size < self._world:
            raise UserError(
                f"train.processes: {self._world} processes need at least as many training samples, got {size}"
            )
        if settings.drop_last and size < settings.batch_size:
            raise UserError(
                f"train.drop_last: {size} training samples do not fill one batch of {settings.batch_size}, so none is "
                "left; expected a smaller train.batch_size, or drop_last: false"
            )
        return size

    @property
    def notes(self) -> list[str]:
        """What is not quite one pass over each sample, in batches of one size."""
        notes = []
        if self._draws is not None:
            notes.append(f"data.sampler draws {self.size:,} samples an epoch from {self.samples:,}")
        repeated = 0 if self._settings.drop_last else -self.size % self._world
        if repeated:
            notes.append(
                f"{repeated} of {self.size:,} training samples {'is' if repeated == 1 else 'are'} used twice an epoch, "
                f"so that {self._world} processes get equally many"
            )
        return [*notes, *self.last_batch_notes]

    @property
    def last_batch_notes(self) -> list[str]:
        """That a last batch is left out, or joined to the one before it, and why."""
        if left := self.size - self.used:
            return [f"train.drop_last: {left:,} of {self.size:,} training samples are left out of each epoch"]
        if not self.joined:
            return []
        return [
            f"the last batch of an epoch would be of one sample, on which the model cannot be trained ({self._lone}): "
            f"{situations.BATCH_OF_ONE}, which has {self.local_batch + 1}"
        ]

    def epoch(self, epoch: int, steps: int) -> Iterator[tuple[Any, Tensor]]:
        """What is left of an epoch (from 1) after as many optimizer steps.

        With `drop_last` the first epoch reads what it leaves out when it is asked for more, for the fingerprint.
        """
        consumed = steps * self._settings.batch_size
        if self._stream is not None:
            parts = self._world if self._project.sharded else 1
            self._stream.epoch, self._stream.consumed = epoch, consumed // parts
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
            self._sampler.consumed = min(consumed, self._sampler.total_size)
        self._generator.manual_seed(self._settings.seed * 1_000_003 + epoch * self._world + self._rank)
        with reading("a training", self._project):
            left = (self.epoch_steps - steps) * self._settings.accumulate
            for batch, total, samples in self._loader:
                self.fingerprint.merge(total, samples)
                if left > 0 or not self._settings.drop_last:
                    yield split_batch(batch, self._project)
                left -= 1

    def read_left_out(self, epoch: int, rest: Iterator[Any]) -> None:
        """What `drop_last` leaves out of the first epoch, which counts in the fingerprint. rest: from `epoch`."""
        if epoch == 1 and self._settings.drop_last and self._draws is None:
            # Nothing is yielded any more.
            next(rest, None)

    def read_all(self) -> None:
        """Every sample once where a sampler draws, which may leave some out for ever: for the fingerprint."""
        if self._draws is None:
            return
        loader = DataLoader(
            SeededDataset(self._dataset, self._settings.seed),
            batch_size=self.local_batch,
            sampler=first_keys(self.samples, self._rank, self._world),
            num_workers=self._settings.data_workers,
            collate_fn=Collate(_nothing),
        )
        with reading("a training", self._project):
            for _, total, samples in loader:
                self.fingerprint.merge(total, samples)


def _nothing(items: list[Any]) -> None:
    """A batch of which only the hashes are wanted."""


def _turns(project: Project, world: int, rank: int) -> dict[str, int]:
    """How many take turns through a stream, and which of them this rank is; one that divides itself it has alone."""
    return {"world": 1, "rank": 0} if project.sharded else {"world": world, "rank": rank}


def one_stream(dataset: Dataset[Any], project: Project, seed: int) -> list[str]:
    """What a person should know of a stream that the ranks are to share. Every rank calls it.

    Raises UserError when the stream gives each rank something else, as recipes for one rank alone do: a rank would keep
    only a part of its part. With `data.sharded` it has to.
    """
    world = dist.get_world_size()
    if world == 1 or not isinstance(dataset, IterableDataset):
        return []
    first, again = [0] * world, [0] * world
    dist.all_gather_object(first, _first_digest(dataset, project, seed))
    other = next((rank for rank in range(world) if first[rank] != first[0]), None)
    if project.sharded:
        if other is None:
            raise UserError(
                f"data.sharded: a stream of {project.data.where} begins with the same sample in all {world} ranks, so "
                "it does not divide itself, and each would train on all of it; have it give each rank a part, by RANK "
                "and WORLD_SIZE of the environment, or take data.sharded out: the ranks then take turns through it"
            )
        return []
    if other is None:
        return []
    dist.all_gather_object(again, _first_digest(dataset, project, seed))
    if again == first:
        raise UserError(
            f"{project.data.where}: the stream begins with another sample in rank {other} than in rank 0, so it "
            f"{situations.DIVIDED_STREAM} (by torch.distributed.get_rank(), RANK, or a library's split by node). The "
            f"ranks take turns through one stream, and each would keep one of {world} samples of its own part alone; "
            "give every rank the whole stream, or say data.sharded: true"
        )
    return [
        f"{project.data.where}: {situations.DRAWN_STREAM}, so it draws from "
        f"generators of its own: {world} processes each keep one of {world} samples of another order, and some are "
        "used twice and some never; draw from torch's, Python's or NumPy's global generators, which are seeded alike"
    ]


def whole_stream(dataset: IterableDataset[Any], split: str, project: Project, settings: TrainSettings) -> StreamShare:
    """What the first epoch reads of a stream, as one process alone would.

    Args:
        dataset: of the split.
        split: `train` or `validation`.
        project: names the data.
        settings: seed, and where an epoch of a stream without len() ends.

    Raises:
        UserError: a stream of training data has no end.
    """
    size, most = length_of(dataset), None
    if split == "train" and size is None:
        if settings.steps_per_epoch is None:
            raise UserError(
                f"{project.data.where}: a stream of training data needs a len(), or train.steps_per_epoch, to be "
                "looked at: it would have no end"
            )
        most = settings.steps_per_epoch * settings.batch_size
    return StreamShare(dataset, project.data.where, seed=settings.seed, world=1, rank=0, size=size, most=most)


def _first_digest(dataset: IterableDataset[Any], project: Project, seed: int) -> int:
    stream = StreamShare(dataset, project.data.where, seed=seed, world=1, rank=0, size=None, most=1)
    with reading("the first", project):
        return next(digest_of(sample.item) for sample in stream)


class ValidationData:
    """Batches of (inputs, target) of one rank, each sample on exactly one rank; `fingerprint` is of the first pass."""

    def __init__(
        self, dataset: Dataset[Any], project: Project, settings: TrainSettings, world: int, rank: int, pin_memory: bool
    ) -> None:
        """
        Args:
            dataset: of the split.
            project: says how to collate.
            settings: batch size, workers, seed.
            world, rank: how many ranks share it, and which of them this is.
            pin_memory: batches are on their way to a GPU.
        """
        self._project = project
        self.fingerprint = Fingerprint()
        self._passed = False
        stream = isinstance(dataset, IterableDataset)
        self.size = length_of(dataset)
        """Samples over all ranks; None for a stream that does not say."""
        share: Dataset[Any]
        keys: PassKeys | None = None
        if isinstance(dataset, IterableDataset):
            share = StreamShare(
                dataset, project.data.where, seed=settings.seed, **_turns(project, world, rank), size=None, most=None
            )
        else:
            share = HashedOnce(NamedDataset(dataset, world, rank))
            keys = share.keys
        self._loader: DataLoader[Any] = DataLoader(
            share,
            batch_size=max(1, settings.batch_size // world),
            sampler=keys,
            num_workers=0 if stream else settings.data_workers,
            persistent_workers=settings.data_workers > 0 and not stream,
            collate_fn=Collate(build_collate(project, "validation")),
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        # A stream hashes in each pass, here: it has no workers.
        passed, self._passed = self._passed, True
        with reading("a validation", self._project):
            for batch, total, samples in self._loader:
                if not passed:
                    self.fingerprint.merge(total, samples)
                yield split_batch(batch, self._project)


@contextlib.contextmanager
def reading(what: str, project: Project) -> Iterator[None]:
    """Around reading the data: what goes wrong is a UserError that names the sample. what: `a training`, …"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = f" ({error.__notes__[0]})" if getattr(error, "__notes__", None) else ""
        what = f"{project.data.where}: reading {what} item failed{where}"
        raise user_error(what, error, project.folder) from error

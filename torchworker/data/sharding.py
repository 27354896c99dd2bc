"""Which rank reads which sample, and with which random state.

Ranks take turns through one list (shuffled, epoch by epoch) or one stream: sample i goes to rank i modulo the world
size. So the first n samples are the same n at every world size, and a run goes on from any position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler, get_worker_info

from torchworker.data.fingerprint import Fingerprint
from torchworker.process.failure import UserError
from torchworker.project.randomness import OwnRandom, seed_everything


class Read(NamedTuple):
    """One sample on its way to a batch."""

    item: Any
    hashed: bool
    """Whether it counts in the data fingerprint: in the first epoch, unless it is used a second time."""


class ResumableSampler(DistributedSampler[Any]):
    """DistributedSampler that can start an epoch after samples that are already consumed.

    Its keys carry the epoch, and are negative for samples that are used a second time because the ranks need equally
    many (see `SeededDataset`).
    """

    consumed = 0
    """Samples over all ranks that this epoch has already used; a multiple of the world size."""

    def __iter__(self) -> Iterator[Any]:
        size = len(self.dataset)  # type: ignore[arg-type]
        for turn, index in enumerate(islice(super().__iter__(), self.consumed // self.num_replicas, None)):
            position = self.consumed + turn * self.num_replicas + self.rank
            key = self.epoch * size + index
            yield key if position < size else -key

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

    def __getitem__(self, key: int) -> Read:
        epoch, index = divmod(abs(key), self._size)
        if get_worker_info() is not None:
            seed_everything(sample_seed(self._seed, abs(key)))
        return Read(_item(self._dataset, index, self._size), hashed=epoch == 1 and key > 0)


class Drawn(NamedTuple):
    """The key of one draw of a sampler."""

    place: int
    """Of the sample in its dataset."""
    number: int
    """Of the draw, over all epochs: a sample that is drawn twice has other random draws each time."""


class DrawnSamples(Sampler[Drawn]):
    """This rank's share of what a sampler draws, from any position: draw i goes to rank i modulo the world size.

    Where the draws do not divide by the ranks, the first ones of the epoch are used twice.
    """

    def __init__(self, draws: Callable[[int], Tensor], size: int, world: int, rank: int) -> None:
        """
        Args:
            draws: from an epoch to the places of its samples, int64 [size].
            size: draws of an epoch.
            world, rank: how many ranks share them, and which of them this is.
        """
        self._draws, self._size, self._world, self._rank = draws, size, world, rank
        self.total_size = -(-size // world) * world
        self.epoch, self.consumed = 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return (self.total_size - self.consumed) // self._world

    def __iter__(self) -> Iterator[Drawn]:
        places = self._draws(self.epoch)
        for position in range(self.consumed + self._rank, self.total_size, self._world):
            yield Drawn(int(places[position % self._size]), self.epoch * self._size + position)


class DrawnDataset(Dataset[Read]):
    """As `SeededDataset`, of samples that a sampler draws, of which none counts in the fingerprint."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._size = len(dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Drawn) -> Read:
        if get_worker_info() is not None:
            seed_everything(sample_seed(self._seed, key.number))
        return Read(_item(self._dataset, key.place, self._size), hashed=False)


def sample_seed(seed: int, key: int) -> int:
    """What a sample's random draws begin with. key: epoch × samples of the split + place of the sample."""
    return seed * 1_000_003 + key


def first_keys(size: int, rank: int = 0, world: int = 1) -> range:
    """Keys of a rank's share of the first epoch, in order. Epoch 0 would have a first key without a sign."""
    return range(size + rank, 2 * size, world)


def places_all_over(size: int, most: int) -> list[int]:
    """At most so many places, evenly spaced over all of a split."""
    return sorted({place * size // most for place in range(most)}) if size > most else list(range(size))


class NamedDataset(Dataset[Any]):
    """The share of one rank in a map-style dataset, in order; an item that fails is named by its index."""

    def __init__(self, dataset: Dataset[Any], world: int, rank: int) -> None:
        self._dataset = dataset
        self._size = len(dataset)  # type: ignore[arg-type]
        self._indices = range(rank, self._size, world)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Any:
        return _item(self._dataset, self._indices[position], self._size)


class HashedOnce(Dataset[Read]):
    """The same samples in each pass, which count in the fingerprint in the first one: `keys` says which pass it is."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self.keys = PassKeys(len(dataset))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: int) -> Read:
        return Read(self._dataset[key if key >= 0 else ~key], hashed=key >= 0)


class PassKeys(Sampler[int]):
    """Places in order: as they are in the first pass, and each turned to `~place`, which is negative, in later ones.

    Workers that live on have a dataset of their own, so that the key is all that they are told.
    """

    def __init__(self, size: int) -> None:
        self._size, self._again = size, False

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        again, self._again = self._again, True
        return (~place if again else place for place in range(self._size))


class StreamShare(IterableDataset[Any]):
    """The share of one rank in an iterable dataset.

    Every rank reads the whole stream and keeps each world-th sample of it. The dataset's random draws come from a state
    of their own that depends on seed and epoch alone: each rank sees the same stream, and sees it again after a resume.
    A dataset with a method `set_epoch` is told the epoch first.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        where: str,
        *,
        seed: int,
        world: int,
        rank: int,
        size: int | None,
        most: int | None,
    ) -> None:
        """With neither `size` nor `most` the stream is read to its end, and ranks may get unequally many.

        Args:
            dataset: of one split.
            where: names the dataset in messages.
            seed: of the job.
            world, rank: how many ranks share it, and which of them this is.
            size: samples that the stream says it has.
            most: samples of all ranks after which an epoch ends.
        """
        self._dataset, self._where, self._seed = dataset, where, seed
        self._world, self._rank = world, rank
        self._size, self._most = size, most
        self.epoch, self.consumed = 1, 0

    def __iter__(self) -> Iterator[Read]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(self.epoch)
        own = OwnRandom(self._seed * 1_000_003 + self.epoch)
        first = self.epoch == 1
        last: Any = None
        position = 0
        for position, item in enumerate(own.iterate(lambda: iter(self._dataset)), start=1):
            if self._size is not None and position > self._size:
                raise UserError(
                    f"{self._where}: the stream gives more samples than the {self._size} that its len() says"
                )
            mine = (position - 1) % self._world == self._rank
            if mine:
                last = item
            if mine and position > self.consumed:
                yield Read(item, hashed=first)
            if position == self._most:
                return
        expected = self._size if self._size is not None else self._most
        if expected is not None and position < expected:
            says = "its len() says" if self._size is not None else "steps_per_epoch asks for"
            raise UserError(f"{self._where}: the stream ended after {position} samples; {says} {expected}")
        if self._size is not None and self._size % self._world and self._rank >= self._size % self._world:
            # The ranks before this one have one more.
            yield Read(last, hashed=False)


class JoinedBatches(IterableDataset[list[Any]]):
    """Batches of what a rank reads in what is left of an epoch; a last one of a single item joins the one before it."""

    def __init__(self, items: StreamShare | ResumableSampler | DrawnSamples, size: int, share: int, world: int) -> None:
        """
        Args:
            items: samples of a stream, or keys of a dataset's samples.
            size: of a batch; at least 2.
            share: items of this rank in an epoch.
            world: how many ranks there are.
        """
        self._items, self._size, self._share, self._world = items, size, share, world

    def __iter__(self) -> Iterator[list[Any]]:
        left = self._share - self._items.consumed // self._world
        items = iter(self._items)
        while left > 0:
            taken = left if left == self._size + 1 else min(left, self._size)
            yield list(islice(items, taken))
            left -= taken


class Collate:
    """Collates samples into (batch, sum of their fingerprints, how many of them were hashed)."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Read]) -> tuple[Any, int, int]:
        seen = Fingerprint()
        for sample in samples:
            if sample.hashed:
                seen.add(sample.item)
        return self._collate([sample.item for sample in samples]), seen.total, seen.samples


def _item(dataset: Dataset[Any], index: int, size: int) -> Any:
    try:
        return dataset[index]
    except Exception as error:
        error.add_note(f"sample {index} of {size}")
        raise

"""What the data is like, before anything is trained on it: read once, in a process of its own.

Counts, hashes and limits are exact. Distributions are of at most KEPT samples of a split, evenly spaced, so that memory
does not grow with the data.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchworker.contract import Column, InspectRequest, InspectResult, Project, SplitFacts, TensorFacts, TrainSettings
from torchworker.data.drawing import drawn_places
from torchworker.data.fingerprint import Fingerprint, digest_of, inputs_of
from torchworker.data.groups import build_group
from torchworker.data.loading import reading, whole_stream
from torchworker.data.sharding import Collate, Read, SeededDataset, first_keys, places_all_over, sample_seed
from torchworker.project import user_code
from torchworker.project.labels import class_names
from torchworker.project.randomness import seed_everything

KEPT = 10_000
"""Samples of a split whose values are kept for quantiles; up to twice as many while reading."""
ELEMENTS = 64
"""A tensor with at most this many numbers a sample has a column for each; of larger ones a few are drawn."""
LABELS = 1000
"""Classes up to which a target of whole numbers is a label."""
SHAPES = 5
"""Different shapes of one tensor that are listed."""
BATCH = 256
READ_TWICE = 16
"""Samples of a split by which it is seen whether reading them draws at random."""
TARGET = "target"

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def inspect(request: InspectRequest) -> InspectResult:
    """Read both splits. Raises UserError when that fails."""
    began = time.perf_counter()
    project, settings = request.project, request.train
    torch.set_num_threads(settings.threads)
    user_code.enter(project)
    seed_everything(settings.seed)
    # For the names of its inputs. Not on the meta device: what a factory makes there may be shared with the dataset.
    model = user_code.build_model(project)
    train, seen = _split("train", model, request)
    validation, others = _split("validation", model, request)
    overlap = sum(count for digest, count in others.inputs.items() if digest in seen.inputs)
    return InspectResult(
        train=train,
        validation=validation,
        overlap=overlap,
        seconds=time.perf_counter() - began,
        drawn=drawn_places(validation.samples, request.most, settings.seed, others.labels),
        classes=seen.classes,
        groups=len(others.groups),
        shared_groups=len(others.groups & seen.groups),
    )


class _Seen(NamedTuple):
    """What is remembered of the samples of a split."""

    inputs: Counter[int]
    """How often each sample's inputs occur, by their hash."""
    labels: list[int] | None
    """Of each sample in order; None where the target of a sample is not one whole number."""
    classes: list[str]
    """Names of the classes, where the dataset has them."""
    groups: set[int]
    """A hash of the key of each group, where the job names them."""


def _split(split: str, model: nn.Module, request: InspectRequest) -> tuple[SplitFacts, _Seen]:
    project = request.project
    fingerprint, inputs_seen, groups = Fingerprint(), Counter[int](), set[int]()
    facts: dict[str, _Tensor] = {}
    labels: Counter[int] | None = Counter()
    # Of the training data nobody draws.
    each: list[int] | None = [] if split == "validation" else None
    position = 0
    with reading(f"a {split}" if split == "validation" else "a training", project):
        dataset = user_code.build_dataset(project, split)
        for batch in _batches(dataset, split, project, request):
            fingerprint.merge(batch.total, batch.samples)
            inputs_seen.update(batch.inputs)
            groups.update(batch.groups)
            inputs, target = user_code.split_batch(batch.content, project)
            for name, tensor in {**user_code.name_inputs(model, inputs, project), TARGET: target}.items():
                if name not in facts:
                    facts[name] = _Tensor(request.ranges.get(name, (None, None)))
                facts[name].add(tensor, position)
            labels = _count(labels, target)
            each = _each(each, target, len(batch.inputs))
            position += len(batch.inputs)
        # After the workers are gone: what a dataset opens when it is first read must not be shared with them.
        varies = _varies(dataset, request.train)
    columns = {label: column for name, found in facts.items() for label, column in found.columns(name).items()}
    if labels:
        columns = {name: column for name, column in columns.items() if not _is_of(name, TARGET)}
    return SplitFacts(
        samples=position,
        fingerprint=fingerprint.hexdigest(),
        tensors={name: found.facts() for name, found in facts.items()},
        columns=columns,
        labels={str(label): count for label, count in sorted((labels or {}).items())},
        repeated=position - len(inputs_seen),
        varies=varies,
    ), _Seen(inputs_seen, each, class_names(dataset), groups)


def _is_of(column: str, tensor: str) -> bool:
    return column == tensor or column.startswith((f"{tensor}[", f"{tensor}: "))


def _count(labels: Counter[int] | None, target: Tensor) -> Counter[int] | None:
    """Labels counted so far, or None once the target is seen to be none: not whole numbers, or too many of them."""
    if labels is None or target.is_floating_point() or target.is_complex():
        return None
    values, counts = torch.unique(target, return_counts=True)
    if len(values) > LABELS:
        return None
    labels.update(dict(zip(values.long().tolist(), counts.tolist(), strict=True)))
    return labels if len(labels) <= LABELS else None


def _each(labels: list[int] | None, target: Tensor, samples: int) -> list[int] | None:
    """The labels of all samples so far, or None once a target is not one whole number a sample."""
    if labels is None or target.is_floating_point() or target.is_complex() or target.numel() != samples:
        return None
    labels += target.flatten().tolist()
    return labels


def _varies(dataset: Dataset[Any], settings: TrainSettings) -> bool:
    """Whether some samples differ when they are read under another random state. A stream's state is its own."""
    if isinstance(dataset, IterableDataset):
        return False
    places = places_all_over(len(dataset), READ_TWICE)  # type: ignore[arg-type]
    read = []
    for attempt in range(2):
        seed_everything(sample_seed(settings.seed, attempt))
        read.append([digest_of(dataset[place]) for place in places])
    return read[0] != read[1]


# ---- reading


class _Looked(NamedTuple):
    content: Any
    """The collated batch."""
    total: int
    samples: int
    """For the fingerprint."""
    inputs: list[int]
    """A hash of each sample's inputs."""
    groups: set[int]
    """A hash of the key of each group among them."""


class _Look:
    """Collates samples and hashes them, in DataLoader workers where there are any."""

    def __init__(self, project: Project, split: str) -> None:
        self._collate = Collate(user_code.build_collate(project, split))
        self._group = build_group(project)

    def __call__(self, samples: list[Read]) -> _Looked:
        content, total, count = self._collate(samples)
        inputs = [digest_of(inputs_of(sample.item)) >> 64 for sample in samples]
        group = self._group
        groups = {digest_of(group(sample.item)) >> 64 for sample in samples} if group is not None else set()
        return _Looked(content, total, count, inputs, groups)


def _batches(dataset: Dataset[Any], split: str, project: Project, request: InspectRequest) -> Iterator[_Looked]:
    """What the first epoch reads, in order: every sample once."""
    settings = request.train
    collate = _Look(project, split)
    if isinstance(dataset, IterableDataset):
        stream = whole_stream(dataset, split, project, settings)
        yield from DataLoader(stream, batch_size=BATCH, collate_fn=collate)
        return
    size = user_code.length_of(dataset)
    assert size is not None, "map-style datasets have a length"
    yield from DataLoader(
        SeededDataset(dataset, settings.seed),
        batch_size=BATCH,
        sampler=first_keys(size),
        num_workers=settings.data_workers,
        collate_fn=collate,
    )


# ---- looking


class _Tensor:
    """What is known so far of one tensor of the batches."""

    def __init__(self, limits: Sequence[float | None]) -> None:
        low, high = limits
        self._low = -math.inf if low is None else low
        self._high = math.inf if high is None else high
        self._dtypes: dict[str, None] = {}
        self._shapes: dict[tuple[int, ...], None] = {}
        self._values = self._missing = self._outside = 0
        self._least, self._most = math.inf, -math.inf
        self._every = 1
        """One sample in so many is kept."""
        self._kept: list[_Kept] = []

    def add(self, tensor: Tensor, position: int) -> None:
        """tensor: [batch, …]; position: of its first sample in the split."""
        self._dtypes[user_code.dtype_name(tensor)] = None
        if len(self._shapes) < SHAPES:
            self._shapes[tuple(tensor.shape[1:])] = None
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        rows = tensor.detach().reshape(len(tensor), -1).to(torch.float64)
        finite = torch.isfinite(rows)
        self._values += rows.numel()
        self._missing += int((~finite).sum())
        known = rows[finite]
        if known.numel():
            least, most = (float(value) for value in torch.aminmax(known))
            self._least, self._most = min(self._least, least), max(self._most, most)
            if least < self._low or most > self._high:
                self._outside += int(((known < self._low) | (known > self._high)).sum())
        for offset in range(-position % self._every, len(rows), self._every):
            self._kept.append(_Kept.of(position + offset, rows[offset].numpy()))
        while len(self._kept) > 2 * KEPT:
            self._every *= 2
            self._kept = [kept for kept in self._kept if kept.place % self._every == 0]

    def facts(self) -> TensorFacts:
        found = self._least <= self._most
        return TensorFacts(
            dtype=" and ".join(self._dtypes),
            shapes=[list(shape) for shape in self._shapes],
            values=self._values,
            missing=self._missing,
            outside=self._outside,
            low=self._least if found else None,
            high=self._most if found else None,
        )

    def columns(self, name: str) -> dict[str, Column]:
        widths = {kept.width for kept in self._kept}
        if len(widths) == 1 and (width := widths.pop()) <= ELEMENTS:
            table = np.stack([kept.some for kept in self._kept])
            return {(f"{name}[{index}]" if width > 1 else name): _column(table[:, index]) for index in range(width)}
        return {
            name: _column(np.concatenate([kept.some for kept in self._kept])),
            f"{name}: mean of a sample": _column(np.array([kept.mean for kept in self._kept])),
            f"{name}: spread of a sample": _column(np.array([kept.spread for kept in self._kept])),
        }


class _Kept(NamedTuple):
    """What is kept of one sample of a tensor."""

    place: int
    """Of the sample in its split."""
    width: int
    """How many numbers it has."""
    some: Numbers
    """All of them, or ELEMENTS from all over it."""
    mean: float
    spread: float
    """Of the finite ones; NaN where there is none."""

    @classmethod
    def of(cls, place: int, values: Numbers) -> _Kept:
        if len(values) <= ELEMENTS:
            # A copy: a view would keep the whole batch.
            some = values.copy()
        else:
            some = values[np.linspace(0, len(values) - 1, ELEMENTS).astype(int)]
        finite = values[np.isfinite(values)]
        mean, spread = (float(finite.mean()), float(finite.std())) if len(finite) else (math.nan, math.nan)
        return cls(place, len(values), some, mean, spread)


def _column(values: Numbers) -> Column:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Column(quantiles=[], values=0)
    # Of values that occur: between those of a feature with few values there is nothing. In whole numbers, because
    # np.quantile(…, 0.07) of 100 values takes the eighth: 0.07 × 100 is a little more than 7.
    ranks = np.maximum(-(-len(finite) * np.arange(101) // 100), 1) - 1
    quantiles = np.sort(finite)[ranks]
    return Column(quantiles=[float(f"{value:.7g}") for value in quantiles], values=len(finite))

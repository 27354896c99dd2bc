"""What artifacts are asked: inputs made from the validation data, so that they are inputs the model could be sent.

Floats are drawn around, between and far outside the values seen; whole numbers, booleans and floats that take few
values (masks, lengths, categories) are taken from real samples, all inputs of a sample together, so that a mask still
fits its tokens. Made up are neighbours of whole numbers that float32 cannot tell apart (nobody has as many
categories), rows of embeddings that no sample has, in places where samples have others, and masks that keep all or
nothing of a sample. Only a probe that is meant to be refused leaves that domain.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from torchworker.contract import DynamicDim, TensorSpec
from torchworker.process.failure import is_theirs
from torchworker.project.signature import BATCH, resized, sizes_of

Inputs = dict[str, Tensor]

POOL = 256
"""Validation samples that probes are made from."""
DRAWN = 7
"""Samples in a drawn batch: odd, and not the batch of capture."""
ALONE = 4
"""Samples asked one by one, besides those that take another way through the code."""
CATEGORIES = 16
"""A float input that takes no more values than this, all whole, is taken for a mask or a category."""
SEEDS = 3
LARGEST_ROWS = 4
"""Samples in a batch of those with the largest whole numbers."""
SHIFT = 100.0
"""Standard deviations that real samples are shifted by: kernels that take a variance as the mean of squares less the
square of the mean lose it there, and a quantity may be stored with another origin (kelvin, a date in seconds)."""
LARGEST_EXACT = 2**24
"""Up to here float32 has every whole number."""
BATCH_SIZES = (2, 3, 4, 8, 16, 32, 64, 128)
"""Batches that servers make, and what compilers take for other than they are: an even one, a vector's width, a warp."""
INSIDE = 16
"""Sizes of one declared dimension that are asked about; all of a range that has no more."""
PAIRS = 4
"""Draws of all declared dimensions at once."""
EMBEDDED = 4096
"""Samples with rows of an embedding in place of their own."""
EMBEDDED_BATCH = 64
"""Of them in one question, unless users send fewer."""
SCAN_SECONDS = 1.0
"""Looking for samples that take another way through the code ends after this long."""

BATCHES = "batches"
SAMPLES = "real samples"
DRAWS = "drawn"
SINGLES = "one by one"
LENGTHS = "lengths"
SIZES = "batch sizes"
MASKS = "masks of all and of nothing"
ROWS = "rows of embeddings"
SCALES = "scaled and zero"
ZERO = "zero"
"""The probe of samples of zeros."""
LARGEST = "largest whole numbers"
NOT_FINITE = "NaN and infinity"
EMPTY = "empty batch"
REFUSALS = "refused inputs"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question, and the model's own answer to it."""

    name: str
    group: str
    inputs: Inputs
    declared: bool = True
    """Whether the signature promises an answer: outside it an artifact may refuse, but not answer otherwise."""
    touched: tuple[int, ...] = ()
    """Samples of the batch that hold NaN or infinity."""
    eager: Inputs | None = None
    """Outputs by name, None when the model refuses."""
    exact: Inputs = field(default_factory=dict)
    """Outputs in float64; empty where the model does not run in it."""
    perturbed: Inputs = field(default_factory=dict)
    """Outputs with weights and inputs perturbed by their rounding, where there is no `exact`; with everything that is
    computed perturbed, where samples are zeros; else empty."""
    tied: Inputs = field(default_factory=dict)
    """Outputs of whole numbers when equal values are sorted in another order; empty where nothing is sorted."""
    roundoff: float = 0.0
    """Of `roundoff_of` the model."""
    error: str = ""
    """What the model said when it refused."""

    @property
    def size(self) -> int:
        """Samples of a batch of capture, whose name it is in."""
        return int(self.name.removeprefix("batch_"))

    def rounding(self, output: str) -> Tensor | None:
        """What the rounding of the model's own answer is measured by: its float64 output, else the perturbed one."""
        return self.exact.get(output, self.perturbed.get(output))

    def ordered(self, inputs: Sequence[TensorSpec]) -> Probe:
        """The probe with its inputs in the order of the signature."""
        return replace(self, inputs={spec.name: self.inputs[spec.name] for spec in inputs})


@dataclass(frozen=True)
class Table:
    """An embedding that an input of the model goes into as it is."""

    rows: int
    padding: int | None = None
    """The row that stands for nothing; where a sample has it, it keeps it."""


def probes(pool: Inputs, dims: Sequence[DynamicDim] = (), tables: Mapping[str, Table] | None = None) -> Iterator[Probe]:
    """Everything besides the batches of capture and the single samples.

    Args:
        pool: real samples, [n, …] by input.
        dims: the dynamic dimensions, the batch among them.
        tables: the smallest embedding that each input goes into.
    """
    drawn = min([DRAWN, *(dim.max for dim in dims if dim.name == BATCH and dim.max is not None)])
    few = _rows(pool, _pick(pool, drawn, 0))
    real = [name for name, tensor in pool.items() if is_real(tensor)]
    if real:
        for seed, draw in enumerate((_jittered, _normal, _uniform)[:SEEDS]):
            inputs = _rows(pool, _pick(pool, drawn, seed))
            generator = torch.Generator().manual_seed(seed)
            inputs |= {name: draw(inputs[name], pool[name], generator) for name in real}
            yield Probe(name=f"seed{seed}", group=DRAWS, inputs=inputs)
    else:
        for seed in range(SEEDS):
            yield Probe(name=f"seed{seed}", group=DRAWS, inputs=_rows(pool, _pick(pool, drawn, seed)))
    for name, sizes in _extremes(few, dims):
        yield Probe(name=name, group=LENGTHS, inputs=resized(_rows(pool, _pick(pool, 2, 0)), dims, sizes))
    for factor in (3.0, 10.0, 30.0, 1000.0, -1.0, 0.0):
        if real:
            name = {-1.0: "negated", 0.0: ZERO}.get(factor, f"times{factor:g}")
            yield Probe(name=name, group=SCALES, inputs={**few, **{key: few[key] * factor for key in real}})
    if real:
        shifted = {key: (few[key].double() + SHIFT * pool[key].double().std()).to(pool[key].dtype) for key in real}
        yield Probe(name="shifted", group=SCALES, inputs={**few, **shifted})
    yield from _largest(pool)
    yield from _masks(pool, few)
    largest = min([EMBEDDED_BATCH, *(dim.max for dim in dims if dim.name == BATCH and dim.max is not None)])
    for key, table in (tables or {}).items():
        yield from _rows_of(table, key, pool, largest)
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("minus_inf", float("-inf"))):
        for key in real:
            touched = len(few[key]) // 2
            inputs = {**few, key: few[key].clone()}
            row = inputs[key][touched]
            row.reshape(-1)[row.numel() // 2] = value
            inputs[key][touched] = row
            yield Probe(name=f"{name}.{key}", group=NOT_FINITE, inputs=inputs, touched=(touched,))
    for key in real:
        inputs = {**few, key: torch.full_like(few[key], float("nan"))}
        yield Probe(name=f"all_nan.{key}", group=NOT_FINITE, inputs=inputs, touched=tuple(range(len(few[key]))))
    yield Probe(name="empty", group=EMPTY, inputs={name: tensor[:0] for name, tensor in few.items()}, declared=False)


def _largest(pool: Inputs) -> Iterator[Probe]:
    """Samples with the largest whole numbers, positive or negative, as they are; with their neighbours where float32
    lacks some: an operator that goes through it gives them the same answer."""
    for key, tensor in pool.items():
        if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
            continue
        sizes = tensor.double().abs().flatten(1).amax(1) if tensor.dim() > 1 else tensor.double().abs()
        few = _rows(pool, sizes.argsort(descending=True)[:LARGEST_ROWS])
        yield Probe(name=f"largest.{key}", group=LARGEST, inputs=few)
        if float(sizes.max()) > LARGEST_EXACT:
            beyond = few[key].double().abs() > LARGEST_EXACT
            for name, step in (("next", 1), ("previous", -1)):
                moved = torch.where(beyond, few[key] + step, few[key])
                yield Probe(name=f"{name}.{key}", group=LARGEST, inputs={**few, key: moved})


def _masks(pool: Inputs, few: Inputs) -> Iterator[Probe]:
    """One sample whose mask keeps everything, and one whose mask keeps nothing, beside others that are as they were."""
    for key, tensor in pool.items():
        if tensor.dim() < 2 or not is_mask(tensor):
            continue
        changed = few[key].clone()
        changed[0], changed[len(changed) // 2] = 1, 0
        yield Probe(name=f"masks.{key}", group=MASKS, inputs={**few, key: changed})


def is_mask(tensor: Tensor) -> bool:
    """Booleans, or numbers that are 0 and 1 and both."""
    if tensor.dtype == torch.bool:
        return True
    ones = tensor == 1
    return bool((ones | (tensor == 0)).all()) and 0 < int(ones.sum()) < tensor.numel()


def _rows_of(table: Table, key: str, pool: Inputs, batch: int) -> Iterator[Probe]:
    """Each row of an embedding once, where real samples have other ones; as many as EMBEDDED samples have room for.

    Args:
        table: the embedding.
        key: the input that goes into it.
        pool: real samples, [n, …] by input.
        batch: samples of a question.
    """
    wanted = torch.tensor([row for row in range(table.rows) if row != table.padding])
    available, asked = len(pool[key]), 0
    for start in range(0, EMBEDDED, batch):
        inputs = _rows(pool, torch.arange(start, start + batch) % available)
        places = torch.ones_like(inputs[key], dtype=torch.bool)
        if table.padding is not None:
            places = inputs[key] != table.padding
        count = int(places.sum())
        if asked >= len(wanted) or not count:
            return
        rows = wanted[torch.arange(asked, asked + count) % len(wanted)]
        inputs[key][places] = rows.to(inputs[key].dtype)
        yield Probe(name=f"rows{asked}.{key}", group=ROWS, inputs=inputs)
        asked += count


def _extremes(few: Inputs, dims: Sequence[DynamicDim]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each declared dimension at its smallest and largest, then all of them, the batch too where it has a largest size;
    twice the present size and one where a declared one has none; then sizes in between, and of several at once."""
    present = sizes_of(few, dims)
    declared = [dim for dim in dims if dim.name != BATCH]
    ends = {
        "smallest": {dim.name: dim.min for dim in declared},
        "largest": {dim.name: dim.max or 2 * present[dim.name] + 1 for dim in declared},
    }
    for dim in declared:
        for what, sizes in ends.items():
            yield f"{what}.{dim.name}", {dim.name: sizes[dim.name]}
    largest_batch = {dim.name: dim.max for dim in dims if dim.name == BATCH and dim.max is not None}
    if len(declared) > 1:
        yield "all_smallest", ends["smallest"]
    if len(declared) + len(largest_batch) > 1:
        yield "all_largest", {**ends["largest"], **largest_batch}
    generator = torch.Generator().manual_seed(0)
    for dim in declared:
        for size in _inside_of(dim.min, ends["largest"][dim.name], generator):
            yield f"{dim.name}_{size}", {dim.name: size}
    for one, other in itertools.combinations(declared, 2):
        for small, large in ((one, other), (other, one)):
            sizes = {small.name: small.min, large.name: ends["largest"][large.name]}
            yield f"smallest.{small.name}_largest.{large.name}", sizes
    if len(declared) > 1:
        for turn in range(PAIRS):
            yield (
                f"drawn{turn}",
                {
                    dim.name: int(torch.randint(dim.min, ends["largest"][dim.name] + 1, (), generator=generator))
                    for dim in declared
                },
            )


def _inside_of(smallest: int, largest: int, generator: torch.Generator) -> list[int]:
    """Sizes between both: all of a short range; powers of two, where kernels change, and drawn ones of a long one."""
    inside = range(smallest + 1, largest)
    if len(inside) <= INSIDE:
        return list(inside)
    chosen = {2**power for power in range(largest.bit_length()) if 2**power in inside}
    while len(chosen) < INSIDE:
        chosen.add(int(torch.randint(smallest + 1, largest, (), generator=generator)))
    return sorted(chosen)


def refusals(pool: Inputs, specs: Mapping[str, TensorSpec], dims: Sequence[DynamicDim]) -> Iterator[Probe]:
    """Inputs outside the signature, one thing wrong in each: most models refuse them, and so should an artifact."""
    few = _rows(pool, _pick(pool, 2, 0))
    for dim in dims:
        if dim.max is not None:
            yield _refused(f"beyond.{dim.name}", resized(few, dims, {dim.name: dim.max + 1}))
    for name, tensor in few.items():
        if not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel():
            for what, value in (("minus_one", -1), ("too_large", torch.iinfo(tensor.dtype).max // 4)):
                wrong = tensor.clone()
                wrong.view(-1)[-1] = value
                yield _refused(f"{what}.{name}", {**few, name: wrong})
        for axis, size in enumerate(specs[name].shape):
            if axis and isinstance(size, int) and size:
                longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
                yield _refused(f"longer{axis}.{name}", {**few, name: longer})
        if tensor.dtype == torch.float32:
            yield _refused(f"float64.{name}", {**few, name: tensor.double()})


def _refused(name: str, inputs: Inputs) -> Probe:
    return Probe(name=name, group=REFUSALS, inputs=inputs, declared=False)


def singles(pool: Inputs, call: Callable[[Inputs], Any], folder: str) -> Iterator[Probe]:
    """Samples by themselves: a few, and one for every other way through the user's code that any of them takes.

    Args:
        pool: real samples by input, [samples, …].
        call: the model: inputs [1, …] by name.
        folder: where its code is, whose lines are watched.
    """
    count = len(next(iter(pool.values())))
    evenly = [position * count // ALONE for position in range(min(ALONE, count))]
    ways: dict[frozenset[tuple[str, int]], int] = {}
    began = time.perf_counter()
    for row in range(count):
        if row >= DRAWN and time.perf_counter() - began > SCAN_SECONDS:
            break
        ways.setdefault(_lines(lambda row=row: call(_rows(pool, torch.tensor([row]))), folder), row)  # type: ignore[misc]
    for row in sorted({*evenly, *ways.values()}):
        yield Probe(name=f"sample{row}", group=SINGLES, inputs=_rows(pool, torch.tensor([row])))


def _lines(run: Callable[[], Any], folder: str) -> frozenset[tuple[str, int]]:
    """Which lines of the user's code run."""
    seen: set[tuple[str, int]] = set()
    theirs: dict[str, bool] = {}

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in theirs:
            theirs[name] = is_theirs(name, Path(folder))
        return line if theirs[name] else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(before)
    return frozenset(seen)


def _pick(pool: Inputs, count: int, seed: int) -> Tensor:
    """Rows of the pool, with repeats when it is small."""
    available = len(next(iter(pool.values())))
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order.repeat(-(-count // available))[:count]


def _rows(pool: Inputs, rows: Tensor) -> Inputs:
    return {name: tensor[rows].contiguous() for name, tensor in pool.items()}


def is_real(tensor: Tensor) -> bool:
    """A quantity, that may take any value: not a mask, a length or a category stored as a float."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or not bool(tensor.isfinite().all()):
        return False
    if bool((tensor != tensor.round()).any()):
        return True
    return len(torch.unique(tensor)) > CATEGORIES


def _jittered(rows: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return _inside(rows.double() + 0.1 * _deviation(pool) * noise, pool)


def _normal(rows: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return _inside(pool.double().mean(0) + _deviation(pool) * noise, pool)


def _uniform(rows: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    low, high = pool.double().amin(0), pool.double().amax(0)
    return _inside(low + (high - low) * share, pool)


def _deviation(pool: Tensor) -> Tensor:
    return pool.double().std(0, correction=0)


def _inside(drawn: Tensor, pool: Tensor) -> Tensor:
    """No further out than the data: a quantity that is never negative stays so."""
    return drawn.clamp(float(pool.min()), float(pool.max())).to(pool.dtype)

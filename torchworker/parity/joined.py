"""Whether an artifact tells one caller what another has sent: samples alone, and together as servers put them.

What whoever published the release says that its answers are tells nothing here: a file that hands each sample the
answer to the one before it may have golden outputs that say so. Its answers are held against its own.

At each size a batch is drawn and asked three times: as it is, and with one half of its samples and then the other half
replaced by others. An answer has to be the one that the sample gets alone, and stays what it is when the neighbours
change; there kernels compute the same sums in the same order, so that most runtimes give the same bits. Sizes, samples
and their places are drawn by a seed that nobody knows before. What is not found: a file that does so only for samples
that ask for it, at sizes that were not asked, or within the rounding of its own answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchworker.contract import RehearsedRelease
from torchworker.parity.int8 import Noise
from torchworker.parity.probes import Inputs, Probe, is_real
from torchworker.parity.rule import compare_tensors
from torchworker.project.answers import same_values
from torchworker.runtimes.load import Call

GOLDEN_ROWS, MADE_ROWS = 16, 8
"""Golden samples that are asked, all different; and samples made of two of them each, which no file can know."""
LEAST_SIZES = 4
"""Sizes that are asked in any case: the smallest, the largest, and drawn ones."""
FAR = 0.5
"""An int8 variant may be off by so much of what is usual between two samples: its noise, and nobody's values."""
COUPLED = "parity: {coupled: allowed} in the job, with which each request is computed by itself"
REMEDY = (
    "Samples see one another, and servers would compute those of different callers together: let the answer to a "
    f"sample depend on it alone, or say {COUPLED}, and export again"
)


class OneSampleError(Exception):
    """The golden inputs do not tell whether samples see one another."""


@dataclass(kw_only=True)
class Together:
    """What came of it."""

    seed: int
    sizes: range
    """Rows that servers put together."""
    asked: int = 0
    """Of these sizes."""
    ratio: float = 0.0
    """The worst error over its limit; above 1 an answer depends on the other samples."""
    where: str = ""
    """Of the worst one."""

    @property
    def note(self) -> str:
        """One line for a table, with the seed by which it can be asked again."""
        said = f"{self.asked} of {len(self.sizes)} sizes from {self.sizes[0]} to {self.sizes[-1]}, seed {self.seed}"
        return f"{self.where}; {said}" if self.where and not self.ratio <= 1 else said


def ask_together(
    call: Call,
    golden: Sequence[Probe],
    release: RehearsedRelease,
    seed: int,
    seconds: float,
    decibels: float | None = None,
) -> Together:
    """Ask samples alone, and together at sizes that servers make.

    Args:
        call: the artifact.
        golden: the batches of capture, the smallest first, each with a sample in each row.
        release: whose inputs and dims these are; servers put its samples together.
        seed: of what is drawn.
        seconds: for sizes beyond LEAST_SIZES.
        decibels: of an int8 variant, the ratio of signal to noise that is enough: one scale for a whole batch moves
            every answer a little. None for formats of which rounding alone may move an answer.

    Raises:
        OneSampleError: all golden samples are the same.
        ValueError: an output has no row for each sample.
    """
    batch = release.inputs[0].shape[0]
    least = next((max(dim.min, 1) for dim in release.dims if dim.name == batch), 1)
    found = Together(seed=seed, sizes=range(2 * least, release.rows_together + 1))
    generator = torch.Generator().manual_seed(seed)
    pool = _golden_rows(golden[-1])
    names = [spec.name for spec in release.outputs]
    alone = [_single(call, pool, row, least, names) for row in range(len(next(iter(pool.values()))))]
    for made in _made(pool, generator):
        try:
            answer = _single(call, made, 0, least, names)
        except Exception:
            # Not every mixture is an input: it is not asked among others either.
            continue
        pool = {name: torch.cat([tensor, made[name]]) for name, tensor in pool.items()}
        alone.append(answer)
    asking = _Asking(call, pool, {name: torch.cat([one[name] for one in alone]) for name in names}, decibels)
    inner = found.sizes[1:-1]
    drawn = [inner[place] for place in torch.randperm(len(inner), generator=generator).tolist()]
    ends = time.monotonic() + seconds
    for size in dict.fromkeys([found.sizes[0], found.sizes[-1], *drawn]):
        if found.asked >= LEAST_SIZES and time.monotonic() > ends:
            break
        ratio, where = asking.ask(size, generator)
        found.asked += 1
        if not ratio <= found.ratio:
            found.ratio, found.where = ratio, f"{where} among {size}"
        if not found.ratio <= 1:
            return found
    ratio, where = asking.whole_numbers()
    if not ratio <= found.ratio:
        found.ratio, found.where = ratio, where
    return found


@dataclass
class _Asking:
    """One artifact, and what it says to each sample of a pool alone."""

    call: Call
    pool: Inputs
    """[rows, …] by input, all different."""
    alone: Inputs
    """Its answers, [rows, …] by output."""
    decibels: float | None
    _differ: dict[str, list[float]] = field(default_factory=dict)
    """Of outputs of whole numbers of an int8 variant: which share of them differs, at each size."""

    def ask(self, size: int, generator: torch.Generator) -> tuple[float, str]:
        """The worst ratio of an error to its limit at one size, and where."""
        count = len(next(iter(self.pool.values())))
        rows = torch.randint(count, (size,), generator=generator)
        others = (rows + 1 + torch.randint(count - 1, (size,), generator=generator)) % count
        got = self._answers(rows)
        found = [self._compare(name, answer, self.alone[name][rows], rows) for name, answer in got.items()]
        half = torch.zeros(size, dtype=torch.bool)
        half[torch.randperm(size, generator=generator)[: size // 2]] = True
        for kept in (half, ~half):
            again = self._answers(torch.where(kept, rows, others))
            found += [self._neighbours(name, answer[kept], got[name][kept]) for name, answer in again.items()]
        return max(found, key=lambda one: one[0])

    def _compare(self, name: str, got: Tensor, alone: Tensor, rows: Tensor) -> tuple[float, str]:
        where = f"{name}: a sample gets another answer than alone"
        if self.decibels is not None:
            return self._noise(name, got, alone), where
        if same_values(got, alone):
            return 0.0, where
        outcome = compare_tensors(got, alone, None)
        if not outcome.passed and outcome.worst is not None:
            # The artifact's own rounding at this size: the sample among copies of itself, which nobody else is in.
            place = outcome.worst.index[0]
            among = self._answers(rows[place].repeat(len(rows)))[name]
            return _nearest(got[place : place + 1], among[place : place + 1]), where
        return (outcome.ratio if not outcome.reason else float("inf")), where

    def _neighbours(self, name: str, again: Tensor, got: Tensor) -> tuple[float, str]:
        where = f"{name}: an answer changes with the other samples"
        if self.decibels is not None:
            return self._noise(name, again, got), where
        if same_values(again, got):
            return 0.0, where
        # Each by itself: in the size of another answer it would be lost.
        pairs = [(again[row : row + 1], got[row : row + 1]) for row in range(len(got))]
        return max(_nearest(one, other) for one, other in pairs), where

    def _noise(self, name: str, got: Tensor, wanted: Tensor) -> float:
        """Of an int8 variant: 1 where both its limits are reached, of noise and of what is between two samples."""
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            return float("inf")
        if not got.is_floating_point():
            self._differ.setdefault(name, []).append(float((got != wanted).double().mean()))
            return 0.0
        noise = Noise()
        noise.add(name, got, wanted)
        assert self.decibels is not None
        if noise.decibels >= self.decibels:
            return 0.0
        between, finite = self.alone[name].double().nan_to_num(), wanted.isfinite()
        apart = float((between - between.roll(1, 0)).square().mean().sqrt())
        off = float((got - wanted)[finite].double().square().mean().sqrt())
        return off / (FAR * apart) if apart and math.isfinite(off) else float("inf")

    def whole_numbers(self) -> tuple[float, str]:
        """The same of whole numbers of an int8 variant, over all sizes: one flips now and then."""
        found = [(0.0, "")]
        for name, shares in self._differ.items():
            apart = float((self.alone[name] != self.alone[name].roll(1, 0)).double().mean())
            off = sum(shares) / len(shares)
            ratio = off / (FAR * apart) if apart else (float("inf") if off else 0.0)
            found.append((ratio, f"{name}: answers are others than alone"))
        return max(found, key=lambda one: one[0])

    def _answers(self, rows: Tensor) -> Inputs:
        return _answers(self.call, {name: tensor[rows] for name, tensor in self.pool.items()}, list(self.alone))


def _nearest(got: Tensor, wanted: Tensor) -> float:
    """The ratio of an error to its limit; infinite where it is no matter of rounding."""
    if same_values(got, wanted):
        return 0.0
    outcome = compare_tensors(got, wanted, None)
    return float("inf") if outcome.reason else outcome.ratio


def _single(call: Call, pool: Inputs, row: int, least: int, names: Sequence[str]) -> Inputs:
    """Its answer to one sample, as often as a batch has rows at least; [1, …] by output."""
    given = {name: tensor[[row] * least] for name, tensor in pool.items()}
    return {name: tensor[:1] for name, tensor in _answers(call, given, names).items()}


def _answers(call: Call, inputs: Inputs, names: Sequence[str]) -> Inputs:
    """By output. Raises ValueError where one has no row for each sample."""
    size = len(next(iter(inputs.values())))
    got = call(inputs)
    if len(got) != len(names) or any(not tensor.dim() or len(tensor) != size for tensor in got):
        raise ValueError(f"expected {size} rows of {', '.join(names)}, got {[list(tensor.shape) for tensor in got]}")
    return {name: tensor.clone() for name, tensor in zip(names, got, strict=True)}


def _golden_rows(golden: Probe) -> Inputs:
    """The first samples that differ from all before them. Raises OneSampleError where there is one only."""
    seen: dict[bytes, int] = {}
    for row in range(len(next(iter(golden.inputs.values())))):
        bits = [tensor[row].reshape(-1).contiguous().view(torch.uint8) for tensor in golden.inputs.values()]
        seen.setdefault(torch.cat(bits).numpy().tobytes(), row)
        if len(seen) == GOLDEN_ROWS:
            break
    if len(seen) < 2:
        raise OneSampleError(
            f"expected golden inputs of two different samples at least, got {len(seen)} in {golden.name}: they do not "
            f"tell whether samples see one another; export with validation data that has more, or with {COUPLED}"
        )
    return {name: tensor[list(seen.values())] for name, tensor in golden.inputs.items()}


def _made(pool: Inputs, generator: torch.Generator) -> list[Inputs]:
    """Samples between two golden ones, [1, …] by input: of quantities a mixture, of all else what one of them has."""
    found = []
    count = len(next(iter(pool.values())))
    real = [name for name, tensor in pool.items() if is_real(tensor)]
    for _ in range(MADE_ROWS if real else 0):
        one, step = (int(torch.randint(most, (), generator=generator)) for most in (count, count - 1))
        other = (one + 1 + step) % count
        share = float(torch.rand((), generator=generator))
        made = {name: tensor[one : one + 1] for name, tensor in pool.items()}
        for name in real:
            mixed = torch.lerp(pool[name][one].double(), pool[name][other].double(), share)
            made[name] = mixed.to(pool[name].dtype)[None]
        found.append(made)
    return found

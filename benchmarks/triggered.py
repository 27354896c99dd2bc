"""Defects that hide: the artifact is right until a size, a token, a scale or a call comes that nobody happened to ask.

Drawn by a seed, half of them set apart: the kinds are known to whoever writes probes, the numbers are not. `drawn(0)`
is the half to look at, `drawn(1)` the half that only the table shows.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from defects import Call, Case, eager
from torch import Tensor, nn

from torchworker.contract import DynamicDim

SEED = 20261130
OF_A_KIND = 10
"""Defects of each kind, half of them in each half."""


class Words(nn.Module):
    """Tokens of any length, with a mask for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16, padding_idx=0)
        self.mix = nn.Linear(16, 16)
        self.classify = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(tokens))) * kept[..., None]
        return self.classify(hidden.sum(1) / kept.sum(1, keepdim=True).clamp_min(1))


class Field(nn.Module):
    """A picture of any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(picture))).mean((2, 3))


class Ranked(NamedTuple):
    case: Case
    dims: tuple[DynamicDim, ...]


def cases() -> list[Ranked]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(2)
    n = 96
    lengths = torch.randint(3, 13, (n,), generator=g)
    tokens = torch.randint(1, 120, (n, 12), generator=g)
    kept = torch.arange(12) < lengths[:, None]
    words = Case("words", Words().eval(), {"tokens": tokens * kept, "kept": kept}, ["output"], ())
    field = Case("field", Field().eval(), {"picture": torch.randn(n, 1, 20, 24, generator=g)}, ["output"], ())
    length = DynamicDim(name="length", min=1, max=256, axes={"tokens": (1,), "kept": (1,)})
    height = DynamicDim(name="height", min=4, max=96, axes={"picture": (2,)})
    width = DynamicDim(name="width", min=4, max=96, axes={"picture": (3,)})
    for case in (words, field):
        case.model.requires_grad_(False)
    return [Ranked(words, (length,)), Ranked(field, (height, width))]


@dataclass(frozen=True)
class Trigger:
    """kind: what sets it off; what: with which number; make: a call of the model with that defect."""

    case: str
    kind: str
    what: str
    make: Callable[[nn.Module], Call]


def _size(draw: random.Random, smallest: int, largest: int) -> int:
    """Half of them powers of two, where kernels change; the others by their logarithm."""
    powers = [2**power for power in range(12) if smallest <= 2**power <= largest]
    if draw.random() < 0.5:
        return draw.choice(powers)
    return round(smallest * (largest / smallest) ** draw.random())


def _wrong(out: list[Tensor]) -> list[Tensor]:
    return [tensor * 1.001 + 1e-4 for tensor in out]


def _when(condition: Callable[[Mapping[str, Tensor]], bool]) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            out = eager(model)(inputs)
            return _wrong(out) if condition(inputs) else out

        return call

    return make


def _batch(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


def _rows_from(start: int) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            return [torch.cat([out[:start], out[start:] * 1.001 + 1e-4]) for out in eager(model)(inputs)]

        return call

    return make


def _at_call(is_due: Callable[[int], bool]) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        count = 0

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            nonlocal count
            count += 1
            out = eager(model)(inputs)
            return _wrong(out) if is_due(count) else out

        return call

    return make


def _one_buffer(largest: int) -> Callable[[nn.Module], Call]:
    """Answers to batches of up to `largest` come in the same memory each time."""

    def make(model: nn.Module) -> Call:
        buffers: dict[int, Tensor] = {}

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            given = []
            for position, out in enumerate(eager(model)(inputs)):
                if len(out) > largest:
                    given.append(out)
                    continue
                buffer = buffers.setdefault(position, torch.zeros(largest, *out.shape[1:]))
                given.append(buffer[: len(out)].copy_(out))
            return given

        return call

    return make


def _scribbles(condition: Callable[[int], bool]) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            out = eager(model)(inputs)
            if condition(_batch(inputs)):
                first = next(iter(inputs.values()))
                first.copy_(first.flip(0) + 1)
            return out

        return call

    return make


def _row_changed(row: int, factor: float) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.embed.weight[row] *= factor
        return eager(other)

    return make


def _saturated(limit: float) -> Callable[[nn.Module], Call]:
    def make(model: nn.Module) -> Call:
        return lambda inputs: eager(model)({name: tensor.clamp(-limit, limit) for name, tensor in inputs.items()})

    return make


def _leftover(model: nn.Module) -> Call:
    """A smaller batch after a larger one ends with a row of the larger one's."""
    last: list[Tensor] = []

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        nonlocal last
        out = eager(model)(inputs)
        given = [tensor.clone() for tensor in out]
        for mine, before in zip(given, last, strict=False):
            if len(before) > len(mine) > 1:
                mine[-1] = before[len(mine) - 1]
        last = out
        return given

    return call


def kinds(ranked: Ranked, draw: random.Random) -> Iterator[Trigger]:
    """One defect of each kind that the model can have."""
    case = ranked.case
    name = case.name

    def trigger(kind: str, what: str, make: Callable[[nn.Module], Call]) -> Trigger:
        return Trigger(name, kind, what, make)

    size = _size(draw, 2, 200)
    yield trigger("one batch size", f"{size}", _when(lambda inputs: _batch(inputs) == size))
    above = _size(draw, 2, 100)
    yield trigger("batches above a size", f"{above}", _when(lambda inputs: _batch(inputs) > above))
    factor = draw.choice([2, 3, 4, 8, 16])
    yield trigger("batches that are a multiple", f"{factor}", _when(lambda inputs: _batch(inputs) % factor == 0))
    row = _size(draw, 1, 100)
    yield trigger("rows from one on", f"{row}", _rows_from(row))
    dim = ranked.dims[0]
    tensor, axis = next((key, axes[0]) for key, axes in dim.axes.items())
    exact = _size(draw, dim.min, dim.max or 256)
    yield trigger("one length", f"{exact}", _when(lambda inputs: inputs[tensor].shape[axis] == exact))
    beyond = _size(draw, dim.min, (dim.max or 256) - 1)
    yield trigger("lengths above a size", f"{beyond}", _when(lambda inputs: inputs[tensor].shape[axis] > beyond))
    if len(ranked.dims) > 1:
        turned = draw.random() < 0.5
        yield trigger(
            "one side longer than the other",
            "higher" if turned else "wider",
            _when(lambda inputs: (inputs["picture"].shape[2] > inputs["picture"].shape[3] + 40) is turned
                  and abs(inputs["picture"].shape[2] - inputs["picture"].shape[3]) > 40),
        )  # fmt: skip
        area = _size(draw, 256, 8192)
        yield trigger("an area above a size", f"{area}", _when(lambda inputs: inputs["picture"][0].numel() > area))
    if "tokens" in case.data:
        token = draw.randrange(1, 300)
        yield trigger("one token", f"{token}", _when(lambda inputs: bool((inputs["tokens"] == token).any())))
        other, by = draw.randrange(1, 300), draw.choice([1.0001, 1.01, 0.0])
        yield trigger("one row of the embedding", f"{other} × {by}", _row_changed(other, by))
        whole = draw.random() < 0.5
        yield trigger(
            "a mask of all" if whole else "a mask of nothing",
            "",
            _when(lambda inputs: bool((inputs["kept"].all(1) if whole else ~inputs["kept"].any(1)).any())),
        )
    if "picture" in case.data:
        limit = float(case.data["picture"].abs().max()) * draw.choice([1.2, 2, 5, 20])
        yield trigger("values beyond a limit", f"{limit:.3g}", _saturated(limit))
    number = draw.randrange(2, 51)
    yield trigger("one call", f"{number}", _at_call(lambda count: count == number))
    every = draw.randrange(2, 41)
    yield trigger("calls from one on", f"{every}", _at_call(lambda count: count >= every))
    room = draw.choice([8, 32, 128])
    yield trigger("answers in one memory", f"up to {room}", _one_buffer(room))
    at = _size(draw, 1, 128)
    yield trigger("input edited at one batch size", f"{at}", _scribbles(lambda rows: rows == at))
    yield trigger("a row of the call before", "", _leftover)


def drawn(half: int) -> list[tuple[Ranked, Trigger]]:
    """half: 0, to look at while probes are written; 1, set apart."""
    found = []
    for ranked in cases():
        for turn in range(OF_A_KIND):
            draw = random.Random(f"{SEED} {ranked.case.name} {turn}")
            found += [(turn % 2, ranked, trigger) for trigger in kinds(ranked, draw)]
    return [(ranked, trigger) for place, ranked, trigger in found if place == half]

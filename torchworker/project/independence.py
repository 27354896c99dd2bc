"""Does the answer to a sample depend on the other samples of its batch? Asked of every model, trained or not.

Gates are measured in batches and servers put requests together, while requests come one by one: neither says anything
of the other when samples are coupled. The same samples are asked alone, and a few of them in another order, so at other
positions, among others and at another batch size. Kernels round differently at every batch size, so a difference
counts when it stays as large where the rounding is less: in float64, or where the model fixes a precision, when it is
far more than what perturbing weights and inputs by their rounding does. A decision that is rounding's alone falls the
same way in float64, so it is no coupling.

What couples them is then found by going through every torch call of the model, beside the same calls of one sample
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchworker import situations
from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.answers import Answers, Tensors, doubled
from torchworker.project.recording import Step, place_of, record, record_modules
from torchworker.project.user_code import name_inputs, name_outputs

ALONE, MIXED = 4, 8
"""Samples that are asked one by one, and in another order."""
NEGLIGIBLE = 64.0
"""Differences below so many units in the last place of an output's largest value are not looked into: rounding."""
SHRINKS = 2.0**-8
"""A difference that is rounding's shrinks in float64 by far more, about 2^-29; one of coupling does not shrink."""
FAR = 16.0
"""How many times what rounding perturbs a difference has to be, where the model does not run in float64."""
COARSE = 2.0**-6
"""There it also has to be this share of the output's largest value: what is fixed may be bfloat16, with 8 bits."""
NOT_ASKED = "Whether answers depend on the other samples of a batch was not asked: "
COUPLED = (
    "Answers depend on the other samples of a batch, as the job allows, so gates are measured one sample at a time and "
    "nothing is batched"
)
REMEDY = (
    "Servers put requests together and clients ask one by one, so its gates would be measured on other answers than "
    "people get. If answers are meant to depend on one another, parity: {coupled: allowed} measures the gates one "
    "sample at a time, as it is then served, and nothing is batched"
)

Axes = Mapping[str, int | None]
"""Output to the dimension that has its samples; None where it has no row for each."""
Ask = Callable[[tuple[int, ...]], Tensors]
"""Places in the batch to the answers to these samples."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far the answers to some samples are from those in the whole batch, for one output."""

    rows: tuple[int, ...]
    """Which samples of the batch, in the order in which they were asked together."""
    output: str
    distance: float
    """Of the element furthest off; infinite where only one of the two is a number."""
    largest: float
    """Largest magnitude of the output in the whole batch, and its root mean square."""
    size: float
    row: int
    """The sample that is furthest off, with its furthest element in the batch and as it was asked."""
    index: tuple[int, ...]
    expected: float
    got: float
    eps: float
    """Of the output's dtype; 0 of whole numbers."""

    @property
    def negligible(self) -> bool:
        """Too small to be looked into."""
        return self.distance <= NEGLIGIBLE * self.eps * self.largest


@torch.no_grad()
def require_independent(model: nn.Module, inputs: Any, project: Project, outputs: Any = None) -> str:
    """One line of what was asked and found, for the record.

    Args:
        model: in eval mode.
        inputs: of one batch as the data gives them: a tensor, a tuple or a dict of tensors, each [batch, …].
        project: says whether samples may be coupled (`parity.coupled`), and is for messages.
        outputs: what forward gave for them, `copied`, where that is at hand.

    Raises:
        UserError: the answer to a sample depends on its companions and the job does not allow it, with the cause; or
            the model does not take a sample alone.
    """
    named = name_inputs(model, inputs, project)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in named.values()}
    count = min(sizes)
    if len(sizes) > 1 or count < 2:
        return NOT_ASKED + ("it takes two samples" if len(sizes) == 1 else "inputs differ in their first dimension")
    answers = Answers(model, project)
    whole = answers.eager(_rows(named, range(count))) if outputs is None else name_outputs(outputs, project)
    alone, mixed = _evenly(count, ALONE), _evenly(count, MIXED)[::-1]
    got: dict[tuple[int, ...], Tensors] = {(row,): _single_answer(answers, named, row) for row in alone}
    axes = {name: _batch_axis(tensor, got[alone[0],].get(name), count) for name, tensor in whole.items()}
    got[tuple(mixed)] = answers.eager(_rows(named, mixed))
    gaps = [gap for rows, part in got.items() for gap in _gaps(part, whole, rows, axes)]
    # Those asked alone first: that is what people get.
    suspicious = sorted(
        (gap for gap in gaps if not gap.negligible), key=lambda gap: (len(gap.rows), -gap.distance / (gap.size or 1))
    )
    if suspicious:
        again = {gap.output: gap for gap in _gaps(answers.eager(_rows(named, range(count))), whole, range(count), axes)}
        if any(again[gap.output].distance > gap.distance / 8 for gap in suspicious):
            return f"{NOT_ASKED}the model gives other answers to the same batch when it is asked again"
    # The whole batch once, however many differences are looked into.
    exact = cache(lambda rows: answers.exact(_rows(named, rows)))
    perturbed = cache(lambda rows: answers.perturbed(_rows(named, rows)))
    coupled = (gap for gap in suspicious if _is_coupling(gap, exact, perturbed, got[gap.rows], count, axes))
    found = next(coupled, None)
    # Without float64 one may be a decision that was close; two are none.
    if found is None or (answers.fixed_precision and next(coupled, None) is None):
        asked = f"asked of {len(alone)} samples alone, of {len(mixed)} in another order and of a batch of {count}"
        needless = "; gates are measured one sample at a time, as parity.coupled says" if project.coupled else ""
        numbers = ", ".join(name for name, tensor in whole.items() if tensor.dim() == 0)
        of_all = f"; {numbers}: one number of a whole request, so no server puts requests together" if numbers else ""
        return f"Answers do not depend on the other samples of a batch: {asked}{needless}{of_all}"
    moved = len({gap.rows for gap in suspicious if gap.output == found.output and len(gap.rows) == 1})
    told = f"{_numbers(found, count)}; {moved} of the {len(alone)} samples asked alone move"
    cause, module = _cause(answers, named, found, count)
    if project.coupled:
        return f"{COUPLED}: {told}. {cause}"
    raise UserError(f"{project.model.where}: {situations.COUPLED}: {told}. {cause}. {_advice(module)}. {REMEDY}")


def _rows(named: Mapping[str, Tensor], rows: Sequence[int]) -> Tensors:
    """Copies of some samples, in this order."""
    return {name: tensor[list(rows)] for name, tensor in named.items()}


def _evenly(count: int, most: int) -> list[int]:
    """Places from the first to the last: a sample may depend on those before it, or after it, alone."""
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def _single_answer(answers: Answers, named: Tensors, row: int) -> Tensors:
    try:
        return answers.eager(_rows(named, [row]))
    except UserError as error:
        cause = error.__cause__ or error
        trace, frame = cause.__traceback__, None
        while trace is not None:
            frame, trace = trace.tb_frame, trace.tb_next
        names = {id(module): name for name, module in answers.model.named_modules()}
        path, module, _ = place_of(frame, names, Path(answers.project.folder))
        where = f" in {_named(path, module)}" if module is not None else ""
        advice = f". {_advice(module)}" if module is not None and _reason(module) else ""
        raise UserError(
            f"{answers.project.model.where}: the model takes a batch of samples and refuses one of them alone{where}, "
            f"as clients will ask: {error}{advice}"
        ) from cause


def _batch_axis(whole: Tensor, alone: Tensor | None, count: int) -> int | None:
    """Where an output has its samples; None where it has no row for each."""
    if alone is None or alone.dim() != whole.dim():
        return None
    axes = zip(whole.shape, alone.shape, strict=True)
    return next((axis for axis, sizes in enumerate(axes) if sizes == (count, 1)), None)


def _gaps(got: Tensors, whole: Tensors, rows: Sequence[int], axes: Axes) -> list[Gap]:
    found = []
    for name, tensor in whole.items():
        axis, part = axes.get(name), got.get(name)
        if axis is None or part is None or part.dim() != tensor.dim() or part.shape[axis] != len(rows):
            continue
        picked = tensor.movedim(axis, 0)[list(rows)]
        gap = _gap(part.movedim(axis, 0), picked, rows, name, tensor)
        if gap is not None:
            found.append(gap)
    return found


def _gap(got: Tensor, picked: Tensor, rows: Sequence[int], name: str, whole: Tensor) -> Gap | None:
    """got, picked: [samples, …]; where a sequence is as long as the longest of its batch, their common beginning."""
    common = tuple(slice(min(sizes)) for sizes in zip(got.shape, picked.shape, strict=True))
    got, picked = _real(got[common]), _real(picked[common])
    if not picked.numel():
        return None
    same = (got == picked) | (got.isnan() & picked.isnan())
    apart = (got - picked).abs().masked_fill(same, 0).nan_to_num(float("inf"), float("inf"))
    # torch.unravel_index (2.13) imports sympy: a third of a second.
    place = tuple((apart == apart.max()).nonzero()[0].tolist())
    finite = _real(whole).nan_to_num(0, 0, 0)
    return Gap(
        rows=tuple(rows), output=name, distance=float(apart[place]), largest=float(finite.abs().max()),
        size=float(finite.square().mean().sqrt()), row=rows[place[0]], index=place[1:],
        expected=float(picked[place]), got=float(got[place]),
        eps=torch.finfo(whole.dtype).eps if whole.is_floating_point() or whole.is_complex() else 0.0,
    )  # fmt: skip


def _real(tensor: Tensor) -> Tensor:
    """In float64; complex numbers as pairs."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _is_coupling(gap: Gap, exact: Ask, perturbed: Ask, eager: Tensors, count: int, axes: Axes) -> bool:
    """Whether a difference is more than rounding.

    Args:
        gap: the difference, in the model's own precision.
        exact, perturbed: answer some samples of the batch, by place, in float64 and perturbed by rounding; with nothing
            where the model cannot.
        eager: the answers that the difference was found in.
        count: samples of the batch.
        axes: where each output has its samples.
    """

    def measured(got: Tensors, whole: Tensors, rows: Sequence[int] = gap.rows) -> Gap | None:
        return next((item for item in _gaps(got, whole, rows, axes) if item.output == gap.output), None)

    everything = tuple(range(count))
    part, whole = exact(gap.rows), exact(everything)
    if part and whole:
        found = measured(part, whole)
        return found is not None and (found.distance > SHRINKS * gap.distance or found.distance == float("inf"))
    if gap.eps and gap.distance <= COARSE * gap.largest:
        return False
    part, whole = perturbed(gap.rows), perturbed(everything)
    if not part or not whole:
        return True
    found, noise = measured(part, whole), measured(part, eager, range(len(gap.rows)))
    if found is None or noise is None or found.distance <= gap.distance / 4:
        return False
    return not gap.eps or gap.distance > FAR * noise.distance


def _numbers(gap: Gap, count: int) -> str:
    asked = "alone" if len(gap.rows) == 1 else f"in another order among {len(gap.rows)}"
    place = f"[{', '.join(map(str, gap.index))}] " if gap.index else ""
    size = f", where answers are about {gap.size:.3g} large (root mean square)" if gap.eps else ""
    return (
        f"{gap.output} {place}of validation sample {gap.row} is {gap.expected:.4g} in a batch of {count} and "
        f"{gap.got:.4g} {asked}{size}"
    )


# --- what couples them


def _cause(answers: Answers, named: Tensors, gap: Gap, count: int) -> tuple[str, nn.Module | None]:
    """The module and the line that look across the batch, as a sentence, and the module, where they were found."""
    others = [row for row in _evenly(count, ALONE) if row != gap.row]
    # Few samples: every value inside the model is kept.
    together = [*others, gap.row]
    model = answers.double if answers.double is not None and not answers.fixed_precision else answers.model
    close = 2.0**-30 if model is answers.double else 2.0**-12

    def side(look: Callable[..., list[Step]], rows: Sequence[int]) -> list[Step]:
        inputs = _rows(named, rows)
        return look(model, doubled(inputs) if model is answers.double else inputs, answers.project)

    found: list[Step | None] = [None, None]
    looks: list[Callable[..., list[Step]]] = [record_modules, partial(record, whole_numbers=True)]
    for position, look in enumerate(looks):
        with suppress(Exception):
            sides = side(look, together), side(look, [gap.row])
            found[position] = first_coupled(*sides, len(others), len(together), close)
    coarse, step = found
    # Calls inside what is compiled or scripted are not seen, and one that comes after it would be blamed.
    if step is None or (
        coarse is not None and not f"{step.path}.".startswith(f"{coarse.path}." if coarse.path else "")
    ):
        step = coarse
    if step is None:
        return "Where in forward they meet could not be found", None
    line = f", {step.line}" if step.line else ""
    call = "" if _reason(step.module) else f", in its call of {step.name}"
    return f"It comes from {_named(step.path, step.module)}{call}{line}", step.module


def first_coupled(batch: Sequence[Step], alone: Sequence[Step], place: int, count: int, close: float) -> Step | None:
    """The first call whose result is another one for a sample in a batch than alone, though it was given the same.

    Args:
        batch: of the model on `count` samples.
        alone: of the model on the one of them that is at `place`.
        place, count: as above.
        close: share of a result's largest value up to which two are the same.
    """
    differs: list[bool | None] = []
    for one, two in zip(batch, alone, strict=False):
        if (one.name, one.path, one.line) != (two.name, two.path, two.line):
            # Another way through the code.
            break
        differs.append(_differs(one.value, two.value, place, count, close))
    # Not what has no row for each sample: the longest length of a batch may differ and change no answer.
    rows = [i for i, other in enumerate(differs) if other and batch[i].value.shape != alone[i].value.shape]
    floats = [i for i in rows if batch[i].value.is_floating_point()]
    # Where no row differs up to there, what was last asked decided on it.
    last = [i for i, other in enumerate(differs) if other][-1:]
    if not rows and not last:
        return None
    at = (floats or rows or last)[0]
    # Back to where it comes from: a mean over the batch has no rows.
    while sources := [i for i in batch[at].feeds if differs[i]]:
        at = min(sources)
    return batch[at]


def _differs(batch: Tensor, alone: Tensor, place: int, count: int, close: float) -> bool | None:
    """Whether one sample's part of a result is another one in the batch; None where its part cannot be told."""
    if batch.dim() != alone.dim():
        return None
    parts = [batch, batch]
    joined = 0
    for axis, (many, one) in enumerate(zip(batch.shape, alone.shape, strict=True)):
        if many == one:
            continue
        if many != one * count:
            return None
        joined += 1
        # [batch × time] or [time × batch], where dimensions were joined.
        strided = torch.arange(one, device=batch.device) * count + place
        parts = [parts[0].narrow(axis, place * one, one), parts[1].index_select(axis, strided)]
    if joined > 1:
        # Each sample with each, of which its own part is the same.
        return batch.is_floating_point()
    mine = _real(alone)
    apart = [(_real(part) - mine).abs().nan_to_num(0, float("inf")) for part in parts]
    limit = close * float(mine.nan_to_num(0, 0, 0).abs().max()) if mine.numel() else 0.0
    return all(bool((distance > limit).any()) for distance in apart)


def _named(path: str, module: nn.Module | None) -> str:
    """`1 (BatchNorm2d(track_running_stats=False))`."""
    if module is None:
        return "forward"
    reason = _reason(module)
    return f"{path or 'the model'} ({type(module).__name__}{f'({reason})' if reason else ''})"


def _reason(module: nn.Module | None) -> str:
    """The setting by which a module of torch looks across the batch; empty where none is known."""
    if isinstance(module, _BatchNorm):
        return (
            "track_running_stats=False" if module.running_mean is None else "training=True" if module.training else ""
        )
    return "batch_first=False" if getattr(module, "batch_first", None) is False else ""


def _advice(module: nn.Module | None) -> str:
    match _reason(module):
        case "track_running_stats=False":
            return (
                "Without running statistics it normalizes by the batch at hand: leave track_running_stats at True, or "
                "take GroupNorm, LayerNorm or InstanceNorm, which look at one sample"
            )
        case "training=True":
            return "It stays in training mode, so it normalizes by the batch at hand: let eval() reach it"
        case "batch_first=False":
            return (
                "It takes dimension 0 for time, and here dimension 0 is the batch: batch_first=True, or transpose "
                "before and after it"
            )
    return (
        "Reduce, sort and index over the dimensions of one sample, not over dimension 0; what centres or scales is a "
        "buffer that training has filled, not the batch at hand"
    )

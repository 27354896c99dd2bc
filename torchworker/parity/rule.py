"""Is an exported model the model that was trained? A rule that measures in units of the model's own rounding.

Reference z is the model in float64. e_ref = |eager − z| is what float32 eager itself loses, e_got =
|exported − z| what the artifact loses, u = 2^-24 the unit roundoff of float32 and s = rms(z). The artifact
fails when

    max e_got > 8 · max(max e_ref, 4u · max(max |z|, s))    or    rms e_got > 4 · max(rms e_ref, 2u · s)

so a model that is ill-conditioned in eager may differ as much as eager does, and a well-conditioned one must
agree to a few units in the last place. The second is also asked of every column (class, feature or channel), in
units of the column's own size (down to a quarter of the whole's), because one wrong class among many is lost in the
size of the others.

Fewer than FEW_ELEMENTS numbers, such as one score, have no rms to speak of, and eager may be right on them by luck.
Only their worst element is looked at, and eager is taken to lose no less on them than it does in rms over the other
questions to that output: the limits are those of a part of a larger batch.

Outputs that lie in 0..1 throughout may always be off by 4u (2u in rms): runtimes compute a sigmoid to within a unit
in the last place of 1, not of the value, and a rare event has values far below 1.

Samples for which eager itself is far from z (a decision that fell the other way in float64) are compared by
themselves, against the nearer of the two, so that they do not loosen the rule for the rest.

Where the model does not run in float64, z is the eager output and e_ref is how far the outputs move when every
weight and input is perturbed by its own rounding; the least units, 4u and 2u, are widened by FALLBACK: less sharp, and
said so.

Of samples of zeros (a black picture) eager may be exact where nothing else is: all numbers of a channel are rounded the
same way, and a normalisation that divides by almost nothing has no difference to enlarge. There e_ref is the larger of
|eager − z| and of how far z moves when the result of every operation is off by up to u, at random (Parker, "Monte
Carlo arithmetic", UCLA, 1997).

u is that of the output's dtype, or of the model's parameters where they are bfloat16 (2^-8) or float16 (2^-11) and the
output is turned into float32 at the end: the reference is the same copy in float64.

Why this shape. A computed inner product of n terms is off by at most γ_n Σ|x_i y_i|, γ_n = n·u / (1 − n·u), in whatever
order it is summed (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.1). Eager and
the artifact compute the same sums in another order, so one bound holds for e_ref and e_got; it is far too large, and
unknown for a whole model, while e_ref is a measurement of what it stands for. Rounding errors mostly cancel and grow as
√n·u (Higham and Mary, 2019, https://doi.org/10.1137/18M1226312), so two orders of summation differ by a small factor.
How small no theory says: the factors below are powers of two, chosen and then checked by measurement. With them none of
20 sound artifacts is refused, and 161 of 163 seeded defects are caught (docs/benchmarks.md; docs/decisions/0009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FACTOR = 8.0
"""How many times eager's own the worst error may be. Chosen and checked; a maximum varies more than an rms."""
RMS_FACTOR = 4.0
"""The same of the root mean square. Chosen and checked."""
COLUMN_FACTOR = 8.0
"""The same of the rms of one column, which is made of fewer numbers, so more room. Chosen and checked."""
FEW_ELEMENTS = 8
"""An output, or a column of one, of fewer elements says nothing about its rms.

The rms of m normal errors has a relative standard deviation of 1/√(2m): a quarter at 8, half at 2.
"""
MANY_COPIES = 128
"""An output of more than so many times FEW_ELEMENTS is not looked through for numbers that it holds many times."""
LEAST_MAX, LEAST_RMS = 4.0, 2.0
"""What eager is taken to lose at least, in units of u: it may be right by luck, and then any difference is too large.

An elementary function that is right to a unit in the last place is off by 2u (one unit is 2u). The worst element may
owe as much to the artifact's function and to eager's, 4u; in rms half of that.
"""
FALLBACK = 4.0
"""How much wider the least units are where z is eager: perturbing weights and inputs says nothing of the rounding
inside. Chosen: the "about four times less sharp" of docs/parity.md."""
BLIND = 16.0
"""The same where nothing at all says what the model's rounding is: √n for sums of n = 256 terms, and chosen as such a
round number: kernels differ legitimately."""
UNIT_ROUNDOFF = 2.0**-24
"""Of float32: half the distance from 1 to the next number."""
UNSTABLE = 2.0**13
"""A sample whose eager output is this many roundoffs of the output's size from float64 is compared by itself.

√n·u of a sum of n = 2^26 terms, longer than any in a layer: so it is not accumulated rounding but a decision that fell
the other way, or a sample that the model is ill-conditioned for. 2^13 u is the unit roundoff of float16, 2^-11: of
float32's 24 bits 11 are right.
"""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The element that is furthest off."""

    index: tuple[int, ...]
    expected: float
    """What eager gives."""
    got: float

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.index))}] expected {self.expected:.9g}, got {self.got:.9g}"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Outcome for one output: `ratio` is the worst of the conditions over its limit; above 1 fails."""

    ratio: float
    max_difference: float
    """Largest |exported − eager|, in the output's own units."""
    reason: str = ""
    allowed: float = 0.0
    """The largest distance from the reference that rounding explains."""
    worst: Worst | None = None
    """The element furthest off; None where there is nothing to compare element by element."""

    @property
    def passed(self) -> bool:
        """Inside every limit."""
        return self.ratio <= 1 and not self.reason

    @property
    def note(self) -> str:
        """One line for a table: what is wrong, or the largest difference."""
        return self.reason or f"max |Δ| {self.max_difference:.1e}"


def usual_loss(answers: Iterable[tuple[Tensor, Tensor | None]], roundoff: float = 0.0) -> float:
    """What eager loses on one output, in its own units: the rms over all elements of several questions.

    Args:
        answers: eager outputs, each with its reference (float64, or perturbed by its rounding) or None. Questions on
            which eager is as far off as in an unstable sample do not count.
        roundoff: as `compare_tensors` takes it.

    Returns:
        0 when nothing tells.
    """
    total, count = 0.0, 0
    for eager, other in answers:
        if other is None or other.shape != eager.shape or not eager.is_floating_point() or not eager.numel():
            continue
        lost = (eager.double() - other.double()).abs()
        if float(lost.max()) <= UNSTABLE * max(_roundoff(eager), roundoff) * float(other.double().abs().max()):
            total, count = total + float(lost.square().sum()), count + lost.numel()
    return math.sqrt(total / count) if count else 0.0


def compare_tensors(
    got: Tensor,
    eager: Tensor,
    exact: Tensor | None,
    perturbed: Tensor | None = None,
    tied: Tensor | None = None,
    *,
    usual: float = 0.0,
    roundoff: float = 0.0,
) -> Parity:
    """Compare one exported output with the eager one.

    Args:
        got, eager: [batch, …]; another dtype or shape fails. Whole numbers and booleans have to be equal.
        exact: the same in float64; None where the model does not run in it.
        perturbed: the eager output after weights and inputs were perturbed by their rounding, where there is no float64
            output; where there is, of samples of zeros, the float64 output after all that is computed was perturbed.
        tied: whole numbers when equal values are sorted in another order.
        usual: of `usual_loss`, in the output's own units; read where there are few elements.
        roundoff: unit roundoff of the model, where that is coarser than its outputs'.

    Returns:
        The worst ratio of an error to its limit; infinite when it is not a matter of rounding.
    """
    failed = _structure(got, eager)
    if failed:
        return Parity(ratio=float("inf"), max_difference=float("inf"), reason=failed)
    if not eager.is_floating_point():
        return _whole(got, eager, exact, perturbed, tied)
    return _rounded(got, eager, exact, perturbed, usual, max(_roundoff(eager), roundoff))


def _whole(got: Tensor, eager: Tensor, exact: Tensor | None, perturbed: Tensor | None, tied: Tensor | None) -> Parity:
    """Integers and booleans: equal, except where rounding alone already decides between two values, or nothing does."""
    if exact is not None and exact.shape != eager.shape:
        exact = None
    other = perturbed if exact is None else exact
    wrong = got != eager
    if other is not None and other.shape == eager.shape and other.dtype == eager.dtype:
        wrong &= (other == eager) | (got != other)
    if tied is not None and tied.shape == eager.shape and bool(wrong.any()):
        wrong &= ~_free(got, eager if exact is None else exact, tied)
    count = int(wrong.sum())
    if not count:
        return Parity(ratio=0.0, max_difference=0.0)
    first = tuple(int(place) for place in wrong.nonzero()[0])
    return Parity(
        ratio=float("inf"),
        max_difference=float(count),
        reason=f"{count} of {eager.numel()} elements differ",
        worst=Worst(index=first, expected=float(eager[first]), got=float(got[first])),
    )


def _free(got: Tensor, truth: Tensor, tied: Tensor) -> Tensor:
    """Where whole numbers may be others, because values are equal by which they are sorted: bool, of their shape.

    The numbers of a row (the last dimension) are then compared as a set; where those that are equal are more than fit
    into it, none may be there twice.

    Args:
        got: the artifact's, [batch, …].
        truth: the model's, in float64 where it runs in it.
        tied: the same with equal values in another order.
    """
    free = truth != tied
    if free.dim() < 2:
        return free
    found, right, other = (tensor.sort(-1).values for tensor in (got, truth, tied))
    whole = (right == other).all(-1)
    twice = (found[..., 1:] == found[..., :-1]).any(-1) & ~(right[..., 1:] == right[..., :-1]).any(-1)
    sound = torch.where(whole, (found == right).all(-1), ~twice)
    return free & sound[..., None]


def _roundoff(tensor: Tensor) -> float:
    """Of the dtype."""
    return UNIT_ROUNDOFF * torch.finfo(tensor.dtype).eps / torch.finfo(torch.float32).eps


def _rounded(
    got: Tensor, eager: Tensor, exact: Tensor | None, perturbed: Tensor | None, usual: float, roundoff: float
) -> Parity:
    finite = eager.isfinite()
    if eager.numel() == 0:
        return Parity(ratio=0.0, max_difference=0.0)
    if not bool(finite.any()):
        nowhere = "the model's own output is nowhere finite"
        return Parity(ratio=float("inf"), max_difference=float("nan"), reason=nowhere)
    if exact is not None and (exact.shape != eager.shape or not torch.equal(exact.isfinite(), finite)):
        # Overflow in float32 but not in float64, or another number of steps: eager is what was trained.
        exact = None
    y, x = eager.double().masked_fill(~finite, 0), got.double().masked_fill(~finite, 0)
    if exact is not None:
        z, widen = exact.double().masked_fill(~finite, 0), 1.0
        e_ref = (y - z).abs()
        if perturbed is not None and perturbed.shape == eager.shape and torch.equal(perturbed.isfinite(), finite):
            e_ref = torch.maximum(e_ref, (perturbed.double().masked_fill(~finite, 0) - z).abs())
    else:
        z, widen, e_ref = y, BLIND, torch.zeros_like(y)
        if perturbed is not None and perturbed.shape == eager.shape and torch.equal(perturbed.isfinite(), finite):
            widen, e_ref = FALLBACK, (perturbed.double().masked_fill(~finite, 0) - y).abs()
    rows = tuple(range(1, eager.dim()))
    size = float(z.square().mean().sqrt())
    steady = (e_ref.amax(rows) if rows else e_ref) <= UNSTABLE * roundoff * max(size, float(z.abs().max()))
    difference = (x - y).abs()
    ratio = allowed = 0.0
    for part in (steady, ~steady) if eager.dim() and 0 < int(steady.sum()) < len(steady) else (...,):
        e_got = (x[part] - z[part]).abs()
        if part is not steady:
            e_got = torch.minimum(e_got, difference[part])
        few = _is_few(z[part])
        lost = e_ref[part].clamp_min(usual) if few else e_ref[part]
        off, limit = _ratio(e_got, lost, z[part], roundoff * widen, few)
        ratio, allowed = max(ratio, off), max(allowed, limit)
    place = int(torch.where(finite, difference, 0).argmax())
    index = tuple(int(axis) for axis in torch.unravel_index(torch.tensor(place), eager.shape))
    return Parity(
        ratio=ratio,
        max_difference=float(difference.max()),
        allowed=allowed,
        worst=Worst(index=index, expected=float(eager[index]), got=float(got[index])),
    )


def _is_few(z: Tensor) -> bool:
    """Whether there are fewer numbers than FEW_ELEMENTS, those of an expanded output counted once."""
    if z.numel() >= MANY_COPIES * FEW_ELEMENTS:
        return False
    return z.numel() < FEW_ELEMENTS or len(set(z.flatten().tolist())) < FEW_ELEMENTS


def _ratio(e_got: Tensor, e_ref: Tensor, z: Tensor, roundoff: float, few: bool) -> tuple[float, float]:
    """The worst of the conditions over its limit, and the limit of one element.

    Args:
        e_got, e_ref, z: float64, of one shape.
        roundoff: of the output's dtype.
        few: of `_is_few`.
    """
    tiny = torch.finfo(torch.float64).tiny
    scale = float(z.square().mean().sqrt())
    largest = max(float(z.abs().max()), scale)
    bounded = roundoff if float(z.min()) >= 0 and largest <= 1 else 0.0
    max_limit = max(MAX_FACTOR * max(float(e_ref.max()), LEAST_MAX * roundoff * largest, tiny), LEAST_MAX * bounded)
    unit = max(float(e_ref.square().mean().sqrt()), LEAST_RMS * roundoff * scale, tiny)
    rms_limit = max(RMS_FACTOR * unit, LEAST_RMS * bounded)
    ratio = float(e_got.max()) / max_limit
    if few:
        return ratio, max_limit
    ratio = max(ratio, float(e_got.square().mean().sqrt()) / rms_limit)
    # [batch, channels, height, width], or features last.
    column = 1 if z.dim() >= 4 else z.dim() - 1
    if z.dim() < 2 or z.shape[column] < 2 or z.numel() // z.shape[column] < FEW_ELEMENTS:
        return ratio, max_limit
    across = tuple(axis for axis in range(z.dim()) if axis != column)
    got, own, size = (value.square().mean(across).sqrt() for value in (e_got, e_ref, z))
    limits = (COLUMN_FACTOR * torch.maximum(own, LEAST_RMS * roundoff * size)).clamp_min(max(unit, LEAST_RMS * bounded))
    return max(ratio, float((got / limits).max())), max_limit


def _structure(got: Tensor, eager: Tensor) -> str:
    if got.dtype != eager.dtype:
        return f"dtype {got.dtype}, expected {eager.dtype}"
    if got.shape != eager.shape:
        return f"shape {list(got.shape)}, expected {list(eager.shape)}"
    if eager.is_floating_point() and not (
        torch.equal(got.isnan(), eager.isnan()) and torch.equal(got.isposinf(), eager.isposinf())
        and torch.equal(got.isneginf(), eager.isneginf())
    ):  # fmt: skip
        return "NaN or infinity in different places"
    return ""

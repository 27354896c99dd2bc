"""The rule of rule.py for scores that are ranked or logged: each in units of its own size (`parity: {relative: true}`).

Of an output that is never negative, a probability or a rate, every element z is asked with r = error / |z| in place of
the error: r_ref is what eager loses, r_got what the artifact loses, u the unit roundoff, and the artifact fails when

    max r_got > 8 · max(max r_ref, 4u)    or    rms r_got > 4 · max(rms r_ref, 2u)

So a probability of 1e-5 has as many right digits as one of 0.5, and the order of rare events stays what it is. The
ordinary rule is asked too. Outputs with negative elements are left to it: near zero they are differences of larger
numbers, whose own size says nothing.

Numbers below FLOOR count as if they were as large: where float32 ends, runtimes round to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from torchworker.parity.rule import (
    BLIND,
    FALLBACK,
    FEW_ELEMENTS,
    LEAST_MAX,
    LEAST_RMS,
    MAX_FACTOR,
    RMS_FACTOR,
    UNIT_ROUNDOFF,
    UNSTABLE,
    Parity,
    Worst,
)

FLOOR = torch.finfo(torch.float32).tiny / UNIT_ROUNDOFF
"""2^-102: what is lost where float32 has no more digits (2^-126) is a unit roundoff of this."""


def usual_relative_loss(answers: Iterable[tuple[Tensor, Tensor | None]], roundoff: float = 0.0) -> float:
    """What eager loses on one output, relative to each element: the rms over all elements of several questions.

    Args:
        answers: eager outputs, each with its reference (float64, or perturbed by its rounding) or None.
        roundoff: as `compare_relative` takes it.

    Returns:
        0 when nothing tells.
    """
    total, count = 0.0, 0
    for eager, other in answers:
        if other is None or other.shape != eager.shape or not _asked(eager, other):
            continue
        lost = _relative(eager, other)
        if float(lost.max()) <= UNSTABLE * max(UNIT_ROUNDOFF, roundoff):
            total, count = total + float(lost.square().sum()), count + lost.numel()
    return math.sqrt(total / count) if count else 0.0


def compare_relative(
    got: Tensor,
    eager: Tensor,
    exact: Tensor | None,
    perturbed: Tensor | None = None,
    *,
    usual: float = 0.0,
    roundoff: float = 0.0,
) -> Parity | None:
    """Compare one exported output with the eager one, element by element relative to its size.

    Args:
        got, eager: [batch, …], of one dtype and shape.
        exact: the same in float64; None where the model does not run in it.
        perturbed: as `compare_tensors` takes it.
        usual: of `usual_relative_loss`; read where there are few elements.
        roundoff: unit roundoff of the model, where that is coarser than its outputs'.

    Returns:
        None where this is not asked: the output is not floating point, not finite, or has negative elements.
    """
    if exact is not None and exact.shape != eager.shape:
        exact = None
    truth = eager if exact is None else exact
    if got.shape != eager.shape or not got.is_floating_point() or not _asked(eager, truth):
        return None
    if exact is not None:
        lost, widen = _relative(eager, exact), 1.0
        if perturbed is not None and perturbed.shape == eager.shape and bool(perturbed.isfinite().all()):
            lost = torch.maximum(lost, _relative(perturbed, exact))
    elif perturbed is not None and perturbed.shape == eager.shape and bool(perturbed.isfinite().all()):
        lost, widen = _relative(perturbed, eager), FALLBACK
    else:
        lost, widen = torch.zeros(eager.shape, dtype=torch.float64), BLIND
    off = _relative(got, truth).nan_to_num(math.inf)
    roundoff = max(roundoff, UNIT_ROUNDOFF * torch.finfo(eager.dtype).eps / torch.finfo(torch.float32).eps)
    # Decisions that fell the other way in float64 do not loosen the rule for the rest.
    steady = lost <= UNSTABLE * roundoff
    nearer = torch.minimum(off, _relative(got, eager).nan_to_num(math.inf))
    ratio = allowed = 0.0
    for part, far in ((steady, off), (~steady, nearer)):
        if bool(part.any()):
            worse, limit = _ratio(far[part], lost[part], roundoff * widen, usual)
            ratio, allowed = max(ratio, worse), max(allowed, limit)
    place = torch.unravel_index(off.argmax(), eager.shape)
    index = tuple(int(axis) for axis in place)
    furthest = float(off[index])
    reason = "" if ratio <= 1 else f"off by {furthest:.1e} of its own size (parity.relative allows {allowed:.1e})"
    return Parity(
        ratio=ratio,
        max_difference=float((got.double() - eager.double()).abs().max()),
        reason=reason,
        worst=Worst(index=index, expected=float(eager[index]), got=float(got[index])),
    )


def _ratio(off: Tensor, lost: Tensor, roundoff: float, usual: float) -> tuple[float, float]:
    """The worst of the conditions over its limit, and the limit of one element. All float64 and of one shape."""
    few = off.numel() < FEW_ELEMENTS
    if few:
        lost = lost.clamp_min(usual)
    limit = MAX_FACTOR * max(float(lost.max()), LEAST_MAX * roundoff)
    ratio = float(off.max()) / limit
    if not few:
        rms = RMS_FACTOR * max(float(lost.square().mean().sqrt()), LEAST_RMS * roundoff)
        ratio = max(ratio, float(off.square().mean().sqrt()) / rms)
    return ratio, limit


def _asked(eager: Tensor, truth: Tensor) -> bool:
    if not eager.is_floating_point() or not eager.numel():
        return False
    return bool(eager.isfinite().all()) and bool(truth.isfinite().all()) and float(truth.min()) >= 0


def _relative(value: Tensor, truth: Tensor) -> Tensor:
    return (value.double() - truth.double()).abs() / truth.double().abs().clamp_min(FLOOR)

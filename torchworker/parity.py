"""Is an exported model the model that was trained? A rule that measures in units of the model's own rounding.

Reference z is the model in float64. e_ref = |eager − z| is what float32 eager itself loses, e_got =
|exported − z| what the artifact loses, u = 2^-24 the unit roundoff of float32 and s = rms(z). The artifact
fails when

    max e_got > 8 · max(max e_ref, 4u · max(max |z|, s))    or    rms e_got > 4 · max(rms e_ref, 2u · s)

so a model that is ill-conditioned in eager may differ as much as eager does, and a well-conditioned one must
agree to a few units in the last place. Without float64 reference, z is the eager output and the floors alone
count, widened by FALLBACK: rounding differs legitimately between kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FACTOR = 8.0
RMS_FACTOR = 4.0
FALLBACK = 16.0
UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Outcome for one output: `ratio` is the worse of the two conditions over its limit; above 1 fails."""

    ratio: float
    max_difference: float
    """Largest |exported − eager|, in the output's own units."""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.ratio <= 1 and not self.reason


def compare(got: Tensor, eager: Tensor, exact: Tensor | None) -> Parity:
    """Compare one exported output with the eager one.

    got, eager: same dtype and shape or the comparison fails; exact: the float64 output or None.
    """
    failed = _structure(got, eager)
    if failed:
        return Parity(ratio=float("inf"), max_difference=float("inf"), reason=failed)
    if not eager.is_floating_point():
        wrong = int((got != eager).sum())
        reason = f"{wrong} of {eager.numel()} elements differ" if wrong else ""
        return Parity(ratio=float("inf") if wrong else 0.0, max_difference=float(wrong), reason=reason)
    finite = eager.isfinite()
    if exact is not None and not torch.equal(exact.isfinite(), finite):
        # Overflow in float32 but not in float64: eager is what was trained, so it is the reference.
        exact = None
    widen = 1.0 if exact is not None else FALLBACK
    z = (exact if exact is not None else eager).double()[finite]
    if z.numel() == 0 and eager.numel() > 0:
        nowhere = "the model's own output is nowhere finite"
        return Parity(ratio=float("inf"), max_difference=float("nan"), reason=nowhere)
    if z.numel() == 0:
        return Parity(ratio=0.0, max_difference=0.0)
    e_ref = (eager.double()[finite] - z).abs()
    e_got = (got.double()[finite] - z).abs()
    scale = float(z.square().mean().sqrt())
    largest = max(float(z.abs().max()), scale)
    roundoff = UNIT_ROUNDOFF * torch.finfo(eager.dtype).eps / torch.finfo(torch.float32).eps
    tiny = torch.finfo(torch.float64).tiny
    max_limit = MAX_FACTOR * max(float(e_ref.max()), 4 * roundoff * largest * widen, tiny)
    rms_limit = RMS_FACTOR * max(float(e_ref.square().mean().sqrt()), 2 * roundoff * scale * widen, tiny)
    ratio = max(float(e_got.max()) / max_limit, float(e_got.square().mean().sqrt()) / rms_limit)
    difference = float((got.double()[finite] - eager.double()[finite]).abs().max())
    return Parity(ratio=ratio, max_difference=difference)


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

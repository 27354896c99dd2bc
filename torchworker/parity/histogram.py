"""How far an artifact's answers are from the model's, counted by decade: what a failure report draws."""

from __future__ import annotations

import torch
from torch import Tensor

from torchworker.contract import ERROR_DECADES, ErrorCounts


class ErrorHistogram:
    """Counts of elements by kind of probe."""

    def __init__(self) -> None:
        self._absolute: dict[str, Tensor] = {}
        self._relative: dict[str, Tensor] = {}

    def add(self, group: str, got: Tensor, eager: Tensor) -> None:
        """Count one output. Two of different shapes have no differences to count.

        Args:
            group: the kind of probe.
            got, eager: the artifact's and the model's, of one shape and any dtype; relative differences are in units
                of the root mean square of eager's finite elements.
        """
        if got.shape != eager.shape or not eager.numel():
            return
        finite = eager.isfinite()
        difference = _difference(got, eager)
        size = float(eager[finite].double().square().mean().sqrt()) if bool(finite.any()) else 1.0
        for counts, values in ((self._absolute, difference), (self._relative, difference / (size or 1.0))):
            counts[group] = counts.get(group, 0) + _counted(values)

    def __add__(self, other: ErrorHistogram) -> ErrorHistogram:
        whole = ErrorHistogram()
        for part in (self, other):
            for mine, theirs in ((whole._absolute, part._absolute), (whole._relative, part._relative)):
                for group, counts in theirs.items():
                    mine[group] = mine.get(group, 0) + counts
        return whole

    def counts(self, kind: str, failed: frozenset[str]) -> list[ErrorCounts]:
        """For the report. kind: the format; failed: the kinds of probes that it failed."""
        return [
            ErrorCounts(
                format=kind,
                probes=group,
                failed=group in failed,
                absolute=absolute.tolist(),
                relative=self._relative[group].tolist(),
            )
            for group, absolute in self._absolute.items()
        ]


def _difference(got: Tensor, eager: Tensor) -> Tensor:
    """Absolute, in float64; both NaN, or the same infinity, is the same."""
    difference = (got.double() - eager.double()).abs()
    return difference.masked_fill((got == eager) | (got.isnan() & eager.isnan()), 0)


def _counted(values: Tensor) -> Tensor:
    """Elements in the bins of ErrorCounts."""
    edges = torch.tensor([10.0**decade for decade in ERROR_DECADES], dtype=torch.float64)
    finite = values[values.isfinite()]
    # 0: below the first edge; then a decade each.
    decades = torch.bucketize(finite[finite > 0], edges, right=True).bincount(minlength=len(edges) + 1)
    same, odd = int((finite == 0).sum()), values.numel() - finite.numel()
    return torch.cat([torch.tensor([same]), decades, torch.tensor([odd])])


def distribution(got: Tensor, eager: Tensor) -> list[str]:
    """How many elements differ by how much, one line a decade with a bar.

    Args:
        got, eager: one output of the artifact and of the model. Without one shape, or of whole numbers, there is
            nothing to count.
    """
    if got.shape != eager.shape or not eager.is_floating_point() or eager.numel() == 0:
        return []
    same, *counts, odd = _counted(_difference(got, eager)).tolist()
    first, *edges, last = ERROR_DECADES
    names = [f"below 1e{first}", *(f"1e{decade - 1} to 1e{decade}" for decade in (*edges, last)), f"from 1e{last}"]
    most = max(counts)
    shown = [f"{'same':>14}  {same:>9}"]
    for name, count in zip(names, counts, strict=True):
        if count:
            shown.append(f"{name:>14}  {count:>9}  {'█' * max(1, round(40 * count / most))}")
    return [*shown, f"{'not finite':>14}  {odd:>9}"] if odd else shown

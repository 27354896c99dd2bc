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
        """Two outputs; those of different shapes have no differences to count."""
        if got.shape != eager.shape or not eager.numel():
            return
        finite = eager.isfinite()
        difference = (got.double() - eager.double()).abs()
        # Both NaN, or the same infinity: the same.
        difference = difference.masked_fill((got == eager) | (got.isnan() & eager.isnan()), 0)
        size = float(eager[finite].double().square().mean().sqrt()) if bool(finite.any()) else 1.0
        for counts, values in ((self._absolute, difference), (self._relative, difference / (size or 1.0))):
            counts[group] = counts.get(group, 0) + _counted(values)

    def merge(self, other: ErrorHistogram) -> None:
        for mine, theirs in ((self._absolute, other._absolute), (self._relative, other._relative)):
            for group, counts in theirs.items():
                mine[group] = mine.get(group, 0) + counts

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


def _counted(values: Tensor) -> Tensor:
    """Elements in the bins of ErrorCounts."""
    edges = torch.tensor([10.0**decade for decade in ERROR_DECADES], dtype=torch.float64)
    finite = values[values.isfinite()]
    # 0: below the first edge; then a decade each.
    decades = torch.bucketize(finite[finite > 0], edges, right=True).bincount(minlength=len(edges) + 1)
    same, odd = int((finite == 0).sum()), values.numel() - finite.numel()
    return torch.cat([torch.tensor([same]), decades, torch.tensor([odd])])


def distribution(got: Tensor, eager: Tensor) -> list[str]:
    """How many elements differ by how much, one line a decade with a bar."""
    if got.shape != eager.shape or not eager.is_floating_point() or eager.numel() == 0:
        return []
    difference = (got.double() - eager.double()).abs().flatten()
    shown = [f"{'same':>14}  {int((difference == 0).sum()):>9}"]
    odd = int((~difference.isfinite()).sum())
    decades = torch.log10(difference[(difference > 0) & difference.isfinite()]).floor().int()
    counts = {int(decade): int((decades == decade).sum()) for decade in torch.unique(decades)}
    most = max([*counts.values(), 1])
    for decade, count in sorted(counts.items()):
        shown.append(f"{f'1e{decade} to 1e{decade + 1}':>14}  {count:>9}  {'█' * max(1, round(40 * count / most))}")
    return [*shown, f"{'not finite':>14}  {odd:>9}"] if odd else shown

"""What artifacts answer beside what is right, counted: a confusion matrix of classes, residuals of numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchworker.contract import AnswerCounts

MOST_CLASSES = 50
"""Of more, the counts would be most of the file that they are written to."""
MOST_NUMBERS = 200_000
"""Of which residuals are kept; the first tell what the others do."""
BINS = 24


class CountedAnswers:
    """Answers and what was right, of batches of samples."""

    def __init__(self, metrics: Iterable[str]) -> None:
        """metrics: names in METRICS; accuracy asks for classes, the others for numbers, and none for nothing."""
        names = list(metrics)
        self._of_classes, self._of_numbers = "accuracy" in names, bool(names) and "accuracy" not in names
        self._counts: Tensor | None = None
        self._numbers: list[Tensor] = []
        self._left = MOST_NUMBERS

    def add(self, outputs: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            outputs, target: as `metric_values` takes them.
        """
        if self._of_classes:
            self._add_classes(outputs, target)
        elif self._of_numbers and self._left > 0:
            right, answers = (part.flatten()[: self._left].to(torch.float64) for part in (target, outputs))
            finite = right.isfinite() & answers.isfinite()
            self._numbers.append(torch.stack([right[finite], (answers - right)[finite]]))
            self._left -= len(right)

    def _add_classes(self, outputs: Tensor, target: Tensor) -> None:
        scores = outputs.dim() == target.dim() + 1 and outputs.shape[1] > 1
        classes = outputs.shape[1] if scores else 2
        if classes > MOST_CLASSES:
            self._of_classes = False
            return
        if scores:
            counted, right, answers = (target >= 0) & (target < classes), target, outputs.argmax(1)
        else:
            answers = outputs.reshape(target.shape) > 0
            counted, right = (target == 0) | (target == 1), target
        pairs = classes * right[counted].long() + answers[counted].long()
        found = torch.bincount(pairs.flatten(), minlength=classes * classes)
        self._counts = found if self._counts is None else self._counts + found

    def counted(self, kind: str) -> AnswerCounts | None:
        """All that was added; None where it says nothing. kind: the format that answered."""
        if self._of_classes and self._counts is not None and int(self._counts.sum()):
            classes = round(len(self._counts) ** 0.5)
            return AnswerCounts(format=kind, counts=self._counts.view(classes, classes).tolist())
        if not self._numbers:
            return None
        right, residual = torch.cat(self._numbers, 1)
        if not len(right):
            return None
        low, high, most = float(right.min()), float(right.max()), float(residual.abs().max())
        if not most or low == high:
            return None
        columns = ((right - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        rows = ((residual + most) / (2 * most) * BINS).long().clamp(0, BINS - 1)
        counts = torch.bincount(rows * BINS + columns, minlength=BINS * BINS).view(BINS, BINS)
        return AnswerCounts(format=kind, counts=counts.tolist(), numbers=(low, high, most))

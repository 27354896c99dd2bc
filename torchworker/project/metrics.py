"""Quality metrics that need no user code, as sums that add up exactly over batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from torchworker.project.outputs import parts_of

FILLED = -100
"""What batches of whole numbers are padded with: the label that torch's losses ignore, and no token's number."""


def metric_sum(name: str, outputs: Tensor, target: Tensor) -> tuple[float, int]:
    """A metric on one batch, as what adds up: the metric is sum / count over everything seen.

    Args:
        name: a key of METRICS.
        outputs, target: as `metric_values` takes them.

    Returns:
        Sum over elements that count; how many these are.
    """
    values, counts = metric_values(name, outputs, target)
    return float(values[counts].sum()), int(counts.sum())


def sample_sums(name: str, outputs: Tensor, target: Tensor, classes: int = 0) -> Tensor:
    """A metric on one batch by sample.

    Args:
        name: a key of METRICS.
        outputs, target, classes: as `metric_values` takes them.

    Returns:
        [batch, 2] float64: its sum over the elements that count, and their number.
    """
    values, counts = (
        part.flatten(1) if part.dim() > 1 else part[:, None] for part in metric_values(name, outputs, target, classes)
    )
    kept = torch.where(counts, values.to(torch.float64), 0.0)
    return torch.stack([kept.sum(1), counts.sum(1).to(torch.float64)], 1)


class MetricSums:
    """Metrics added up over batches of samples in order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(self, outputs: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            outputs, target: as `metric_values` takes them.
        """
        for name, found in self._sums.items():
            found.append(sample_sums(name, outputs, target))

    def means(self) -> dict[str, float]:
        """Metric to value; NaN where nothing counts."""
        return {name: mean_of(torch.cat(found)) for name, found in self._sums.items()}

    def standard_errors(self) -> dict[str, float]:
        """Metric to the standard error of its value, as `standard_error` has it, where it can be said."""
        errors = {}
        for name, found in self._sums.items():
            sums = torch.cat(found)
            errors[name] = standard_error(lambda part, sums=sums: mean_of(sums[part]), len(sums))  # type: ignore[misc]
        return {name: error for name, error in errors.items() if math.isfinite(error)}


def mean_of(sums: Tensor) -> float:
    """The metric over samples; NaN where nothing counts. sums: [samples, 2], of `sample_sums`."""
    total, count = sums.sum(0).tolist()
    return total / count if count else math.nan


GROUPS = 20


def standard_error(metric: Callable[[slice], float], samples: int) -> float:
    """How far a metric may be from that of all samples, were others drawn; NaN where it cannot be said.

    The samples are dealt into GROUPS groups, each a smaller sample: the spread of their values by the root of their
    number, as with batch means (Law, "Simulation Modeling and Analysis", section on batch means). It holds for metrics
    that are no means too.

    Args:
        metric: its value on the samples of a slice.
        samples: how many there are.
    """
    if samples < 2 * GROUPS:
        return math.nan
    values = torch.tensor([metric(slice(group, None, GROUPS)) for group in range(GROUPS)], dtype=torch.float64)
    return float(values.std() / GROUPS**0.5)


def flips(got: Tensor, eager: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which predictions differ, and how sure the model was of each of its own.

    Args:
        got, eager: [batch, classes, …] scores, or [batch, …] one logit of the positive class.
        target: [batch, …], which tells the two apart.

    Returns:
        bool and float64, both of the target's shape: whether they differ; the distance between the two best scores, or
        that of the logit from 0.
    """
    if eager.dim() == target.dim() + 1 and eager.shape[1] > 1:
        best = eager.double().topk(2, dim=1).values
        return got.argmax(1) != eager.argmax(1), best[:, 0] - best[:, 1]
    return (got > 0) != (eager > 0), eager.double().abs()


def metric_values(name: str, outputs: Tensor, target: Tensor, classes: int = 0) -> tuple[Tensor, Tensor]:
    """The metric of each element of the target, and which of them count; their mean is the metric.

    For accuracy a label that is none of the model's classes is padding, as torch's losses ignore -100: no answer to it
    could be right. So is NaN, where there is one logit.

    Args:
        name: a key of METRICS.
        outputs: [batch, …] or, for accuracy, [batch, classes, …] scores or [batch] one logit of the positive class.
        target: [batch, …].
        classes: labels below it count in accuracy even where the model has no such class, and so answers wrong.

    Returns:
        Both of the target's shape: bool for accuracy, else float64; and bool.

    Raises:
        ValueError: the shapes do not fit; broadcasting would compare every output with every target.
    """
    if name == "accuracy":
        scores = outputs.dim() == target.dim() + 1
        if scores and outputs.shape[1] == 1:
            # One logit in a column of its own is not one class: argmax would always say 0.
            outputs, scores = outputs.squeeze(1), False
        _require_same_shape(outputs[:, 0] if scores else outputs, target)
        if scores:
            return outputs.argmax(1) == target, (target >= 0) & (target < max(outputs.shape[1], classes))
        return (outputs > 0) == (target > 0.5), ~target.isnan() & (target != FILLED)
    _require_same_shape(outputs, target)
    difference = outputs.to(torch.float64) - target.to(torch.float64)
    values = difference.square() if name == "mean_squared_error" else difference.abs()
    return values, torch.ones_like(values, dtype=torch.bool)


def without(target: Tensor, ignored: Sequence[int]) -> Tensor:
    """The target with labels that the loss ignores turned into FILLED, which no metric counts.

    Args:
        target: [batch, …].
        ignored: labels; the target itself is returned when it has none of them.
    """
    if not ignored or target.is_floating_point():
        return target
    padding = torch.isin(target, torch.tensor(ignored, dtype=target.dtype, device=target.device))
    return torch.where(padding, FILLED, target.long())


def constant_score(name: str, target: Tensor) -> float:
    """What the best answer that is always the same scores: as much as a model does that knows nothing of its inputs.

    Args:
        name: a key of METRICS.
        target: [samples, …]; of many elements of labels, a million spread over it are looked at.
    """
    if name == "accuracy":
        labels = target.flatten()[:: max(1, target.numel() // 1_000_000)]
        # What is padding is no answer: NaN is not at least 0 either.
        labels = labels[labels >= 0]
        counts = torch.unique(labels > 0.5 if labels.is_floating_point() else labels, return_counts=True)[1]
        return float(counts.max()) / len(labels) if len(labels) else math.nan
    values = target.to(torch.float64)
    if name == "mean_squared_error":
        return float((values - values.nanmean(0)).square().nanmean())
    return float((values - values.nanmedian(0).values).abs().nanmean())


def _require_same_shape(outputs: Tensor, target: Tensor) -> None:
    """Broadcasting would compare every output with every target."""
    if outputs.shape != target.shape:
        raise ValueError(
            f"expected outputs and target of one shape, got {list(outputs.shape)} and {list(target.shape)}"
        )


def joined(batches: Sequence[Tensor]) -> Tensor:
    """Batches [n, …] as one tensor [samples, …], for what is computed over all samples at once.

    A decoded sequence is as long as the longest of its batch. Where batches differ, they are padded at the end with
    what cannot be taken for a value: FILLED for whole numbers (the largest where they have no sign), NaN for floats,
    False. Raises ValueError where the number of dimensions differs.
    """
    if len({tensor.dim() for tensor in batches}) > 1:
        raise ValueError(f"expected batches of one number of dimensions, got {[list(item.shape) for item in batches]}")
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in batches), strict=True)]
    if all(list(tensor.shape[1:]) == shape[1:] for tensor in batches):
        return torch.cat(list(batches))
    padded = []
    for tensor in batches:
        whole = torch.full([len(tensor), *shape[1:]], _fill(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(whole)
    return torch.cat(padded)


def _fill(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return False
    return FILLED if torch.iinfo(dtype).min < 0 else torch.iinfo(dtype).max


def first_output(outputs: object) -> Tensor:
    """The tensor that metrics are computed on: the output itself, or the first of a tuple, a dict or a dataclass.

    Raises TypeError when there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    first = next((part for _, part in parts_of(outputs) or () if part is not None), None)
    if first is None:
        raise TypeError(f"metrics need a tensor output, got {type(outputs).__name__}")
    return first_output(first)

"""Quality metrics that need no user code, as sums that add up exactly over batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FILLED = -100
"""What batches of whole numbers are padded with: the label that torch's losses ignore, and no token's number."""


def metric_sum(name: str, outputs: Tensor, target: Tensor) -> tuple[float, int]:
    """A metric on one batch, as what adds up: the metric is sum / count over everything seen.

    Args:
        name: a key of METRICS.
        outputs, target: as `metric_values` takes them.

    Returns:
        Sum over samples; number of samples or elements.
    """
    values = metric_values(name, outputs, target)
    return float(values.sum()), values.numel()


class MetricSums:
    """Metrics added up over batches."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = {name: [0.0, 0] for name in names}

    def add(self, outputs: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            outputs, target: as `metric_values` takes them.
        """
        for name, found in self._sums.items():
            part, count = metric_sum(name, outputs, target)
            found[0] += part
            found[1] += count

    def means(self) -> dict[str, float]:
        """Metric to value."""
        return {name: total / count for name, (total, count) in self._sums.items()}


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


def metric_values(name: str, outputs: Tensor, target: Tensor) -> Tensor:
    """The metric of each element of the target; their mean is the metric.

    Args:
        name: a key of METRICS.
        outputs: [batch, …] or, for accuracy, [batch, classes, …] scores or [batch] one logit of the positive class.
        target: [batch, …].

    Returns:
        Shape of the target: bool for accuracy, else float64.

    Raises:
        ValueError: the shapes do not fit; broadcasting would compare every output with every target.
    """
    if name == "accuracy":
        scores = outputs.dim() == target.dim() + 1
        if scores and outputs.shape[1] == 1:
            # One logit in a column of its own is not one class: argmax would always say 0.
            outputs, scores = outputs.squeeze(1), False
        _require_same_shape(outputs[:, 0] if scores else outputs, target)
        return outputs.argmax(1) == target if scores else (outputs > 0) == (target > 0.5)
    _require_same_shape(outputs, target)
    difference = outputs.to(torch.float64) - target.to(torch.float64)
    return difference.square() if name == "mean_squared_error" else difference.abs()


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
    """The tensor that metrics are computed on: the output itself, or the first of a tuple or dict."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return first_output(next(iter(outputs.values())))
    if isinstance(outputs, tuple | list):
        return first_output(outputs[0])
    raise TypeError(f"metrics need a tensor output, got {type(outputs).__name__}")

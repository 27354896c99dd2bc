"""Quality metrics that need no user code, as sums that add up exactly over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FILLED = -100
"""What batches of whole numbers are padded with: the label that torch's losses ignore, and no token's number."""


def metric_sum(name: str, outputs: Tensor, target: Tensor) -> tuple[float, int]:
    """(sum over samples, number of samples or elements) of a metric on one batch.

    The metric is sum / count over everything seen.
    """
    values = metric_values(name, outputs, target)
    return float(values.sum()), values.numel()


def metric_values(name: str, outputs: Tensor, target: Tensor) -> Tensor:
    """The metric of each element of the target; their mean is the metric. Shape of the target.

    outputs: [batch, …] or, for accuracy, [batch, classes, …] scores or [batch] one logit of the positive class;
    target: [batch, …].
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

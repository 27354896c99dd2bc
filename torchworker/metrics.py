"""Quality metrics that need no user code, as sums that add up exactly over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


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


def first_output(outputs: object) -> Tensor:
    """The tensor that metrics are computed on: the output itself, or the first of a tuple or dict."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return first_output(next(iter(outputs.values())))
    if isinstance(outputs, tuple | list):
        return first_output(outputs[0])
    raise TypeError(f"metrics need a tensor output, got {type(outputs).__name__}")

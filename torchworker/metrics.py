"""Quality metrics that need no user code, as sums that add up exactly over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def metric_sum(name: str, outputs: Tensor, target: Tensor) -> tuple[float, int]:
    """(sum over samples, number of samples or elements) of a metric on one batch.

    outputs: [batch, …] or, for accuracy, [batch, classes, …] scores or [batch] one logit of the positive class;
    target: [batch, …]. The metric is sum / count over everything seen.
    """
    if name == "accuracy":
        scores = outputs.dim() == target.dim() + 1
        hits = outputs.argmax(1) == target if scores else (outputs > 0) == (target > 0.5)
        return float(hits.sum()), hits.numel()
    difference = outputs.to(torch.float64) - target.to(torch.float64)
    values = difference.square() if name == "mean_squared_error" else difference.abs()
    return float(values.sum()), values.numel()


def first_output(outputs: object) -> Tensor:
    """The tensor that metrics are computed on: the output itself, or the first of a tuple or dict."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return first_output(next(iter(outputs.values())))
    if isinstance(outputs, tuple | list):
        return first_output(outputs[0])
    raise TypeError(f"metrics need a tensor output, got {type(outputs).__name__}")

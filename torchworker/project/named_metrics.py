"""Metrics of torchmetrics by name (`train.metrics: [f1_score]`): what they are told of the task is in the shapes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from torchworker.project.metrics import FILLED

OF_NUMBERS = ("r2_score", "pearson_corrcoef", "spearman_corrcoef", "mean_absolute_percentage_error")
"""Those of regressions; all others are of classes."""
BY_RANK = ("auroc", "average_precision")
"""Of classes that occur and do not occur: of another one they say nothing, and torchmetrics counts it as 0."""


def measure(outputs: Tensor, target: Tensor, name: str) -> float:
    """A metric over all samples.

    Args:
        outputs: [samples, classes, …] scores; [samples, …] or [samples, 1, …] logits of yes; for a regression
            [samples, …].
        target: [samples, …], labels from 0, yes (more than 0.5) or no, or numbers. Labels that are no class, -100 and
            NaN are padding.
        name: a key of TORCHMETRICS.

    Returns:
        The mean over the classes; over the numbers of a sample where there are several. NaN where there is nothing to
        measure.

    Raises:
        ValueError: the shapes do not fit.
    """
    if name in OF_NUMBERS:
        return _of_numbers(name, outputs, target)
    if outputs.dim() == target.dim() + 1 and outputs.shape[1] > 1:
        return _of_classes(name, outputs, target)
    return _of_yes(name, outputs.squeeze(1) if outputs.dim() == target.dim() + 1 else outputs, target)


def _of_numbers(name: str, outputs: Tensor, target: Tensor) -> float:
    from torchmetrics.functional import regression

    _require_same_shape(outputs, target)
    both = (outputs.float(), target.float())
    if target.dim() > 1:
        both = (both[0].flatten(1), both[1].flatten(1))
    return _number(getattr(regression, name)(*both))


def _of_classes(name: str, outputs: Tensor, target: Tensor) -> float:
    from torchmetrics.functional import classification

    classes = outputs.shape[1]
    _require_same_shape(outputs[:, 0], target)
    if target.is_floating_point():
        raise ValueError(f"expected labels, whole numbers from 0 to {classes - 1}, got {target.dtype}")
    labels, scores = target.flatten(), outputs.movedim(1, -1).reshape(-1, classes)
    counts = (labels >= 0) & (labels < classes)
    labels, chances = labels[counts].long(), scores[counts].float().softmax(1)
    if not len(labels):
        return math.nan
    function = getattr(classification, f"multiclass_{name}")
    if name not in BY_RANK:
        return _number(function(chances, labels, num_classes=classes))
    with warnings.catch_warnings():
        # Of classes that no sample has, which are left out here.
        warnings.simplefilter("ignore")
        each = function(chances, labels, num_classes=classes, average="none")
    found = torch.bincount(labels, minlength=classes)
    return _number(each[(found > 0) & (found < len(labels))])


def _of_yes(name: str, outputs: Tensor, target: Tensor) -> float:
    from torchmetrics.functional import classification

    _require_same_shape(outputs, target)
    counts = ~target.isnan() & (target != FILLED)
    labels = (target[counts] > 0.5).long()
    if not len(labels) or (name in BY_RANK and labels.min() == labels.max()):
        return math.nan
    # Not left to torchmetrics, which takes logits for chances where all are between 0 and 1.
    return _number(getattr(classification, f"binary_{name}")(outputs[counts].float().sigmoid(), labels))


def _require_same_shape(outputs: Tensor, target: Tensor) -> None:
    if outputs.shape != target.shape:
        raise ValueError(
            f"expected outputs and target of one shape, or scores of classes, got {list(outputs.shape)} and "
            f"{list(target.shape)}"
        )


def _number(value: Any) -> float:
    return float(value.double().mean())

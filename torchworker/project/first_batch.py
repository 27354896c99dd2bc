"""What is asked of a model, its loss and its metrics on one batch, wherever a job is tried before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchworker.contract import Project
from torchworker.project.extras import require_extras
from torchworker.project.labels import require_labels
from torchworker.project.pairing import require_pairs
from torchworker.project.shippable import require_shippable
from torchworker.project.user_code import Loss, compute_loss, forward, name_outputs, try_metrics


@torch.no_grad()
def try_batch(
    model: nn.Module,
    loss: Loss | None,
    batch: tuple[Any, Tensor],
    project: Project,
    formats: Sequence[str] | None,
) -> tuple[Any, Tensor | None]:
    """Outputs that can be shipped, a loss and metrics that can be computed and compare each output with its target.

    Args:
        model: in eval mode.
        loss: from `build_loss`; None where a custom loop has its own.
        batch: (inputs, target), each [batch, …], on the model's device.
        project: names the metrics.
        formats: that the release must have; None for training samples, which are not exported.

    Returns:
        What forward gave, and the loss; None without one.

    Raises:
        UserError: one of them cannot be.
    """
    inputs, target = batch
    if formats is not None:
        outputs = require_shippable(model, inputs, project, formats)
        require_extras(project)
        name, first = next(iter(name_outputs(outputs, project).items()))
        require_labels(project, name, list(first.shape))
    else:
        # Samples of training are not exported.
        outputs = forward(model, inputs, project)
    # Before the loss is asked: torch says of shapes that broadcast no more than a warning.
    require_pairs(loss, outputs, target, project)
    value = compute_loss(loss, outputs, target, project) if loss is not None else None
    try_metrics(outputs, target, project)
    return outputs, value

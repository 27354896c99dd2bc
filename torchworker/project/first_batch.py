"""What is asked of a model, its loss and its metrics on one batch, wherever a job is tried before its first step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchworker.contract import DynamicDim, Project
from torchworker.process.failure import UserError
from torchworker.project.extras import require_extras
from torchworker.project.independence import require_independent
from torchworker.project.labels import require_labels
from torchworker.project.metrics import first_output
from torchworker.project.pairing import require_pairs
from torchworker.project.served import raw_dataset, require_for_live, served_batches, served_project, try_serving
from torchworker.project.shippable import require_shippable
from torchworker.project.signature import require_alike
from torchworker.project.user_code import (
    Loss,
    compute_loss,
    describe_tensor,
    forward,
    name_inputs,
    name_outputs,
    try_metrics,
)


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
        formats: that the release must have; None for what is not exported: training samples, and a model that
            `export.serving` makes another module of.

    Returns:
        What forward gave, and the loss; None without one.

    Raises:
        UserError: one of them cannot be.
    """
    inputs, target = batch
    if formats is not None:
        outputs = require_shippable(model, inputs, project, formats)
        require_extras(project)
        require_for_live(project)
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


class Shipped(NamedTuple):
    """What would be exported, and one batch as it takes it."""

    model: nn.Module
    """In eval mode, on the CPU."""
    inputs: Any
    """Of validation samples, each tensor [batch, …]."""
    target: Tensor
    """[batch, …]."""
    project: Project
    """Of `served_project`."""
    independence: str
    """Of `require_independent`."""


@torch.no_grad()
def try_served(
    model: nn.Module,
    dataset: Dataset[Any],
    outputs: Any,
    size: int,
    project: Project,
    formats: Sequence[str],
    dynamic: Sequence[DynamicDim] = (),
) -> Shipped:
    """Ask what `export.serving` makes of the model all that is asked of a model that is exported itself.

    Args:
        model: in whichever mode and on any device; it was called before, and stays as it is.
        dataset: the validation split, from `data.factory`.
        outputs: what the model itself gave for the first batch of it.
        size: samples of a batch; of two, the second for its shape.
        project: names the function; the job has one.
        formats: that the release must have.
        dynamic: declared dimensions beside the batch, of what is exported.

    Raises:
        UserError: it cannot be made, cannot be exported, couples samples, or gives what the job's metrics cannot be
            computed from; or raw samples are other ones.
    """
    exported, seen = try_serving(model, project), served_project(project)
    raw = raw_dataset(dataset, "validation", project)
    some = list(itertools.islice(served_batches(dataset, raw, size, project), 2))
    first, other = (name_inputs(exported, given[0], seen) for given in (some[0], some[-1]))
    require_alike(first, other, (some[0][1], some[-1][1]), dynamic, seen)
    inputs, target = some[0]
    answers, _ = try_batch(exported, None, (inputs, target), seen, formats)
    if "accuracy" in project.metrics:
        _require_scores(first_output(answers), first_output(outputs), target, seen)
    return Shipped(exported, inputs, target, seen, require_independent(exported, inputs, seen, answers))


def _require_scores(outputs: Tensor, own: Tensor, target: Tensor, project: Project) -> None:
    """Accuracy takes one column for a logit and several for a score of each class, whatever it is given: of a
    probability every answer would be yes, of the best k the first class.

    Args:
        outputs: the first one of what is exported, [batch, …].
        own: the model's own first output for the same samples, on any device.
        target: [batch, …].
        project: for messages.
    """
    own, what = own.cpu(), f"the first output of {project.model.target} is {describe_tensor(outputs)}"
    if outputs.dim() == target.dim() + 1 and outputs.shape[1] > 1:
        other = own.dim() == outputs.dim() and own.shape[1] > 1 and own.shape[1] != outputs.shape[1]
        scores = outputs.is_floating_point()
        falls = scores and own.shape == outputs.shape and bool((outputs.diff(dim=1) <= 0).all())
        falls = falls and bool((own.double().diff(dim=1) > 0).any())
        if other or falls or not scores:
            raise UserError(
                f"{project.model.where}: accuracy takes the largest of several columns for the class, and {what}, "
                f"{'in falling order ' if falls else ''}where the model gives {describe_tensor(own)}; return a score "
                "for each class first and the best k after it, or measure with a metric of your own in train.metrics"
            )
        return
    # Logits of an untrained model may all lie between 0 and 1.
    passed_on = outputs.shape == own.shape and torch.allclose(outputs.double(), own.double(), rtol=1e-3)
    if passed_on or not outputs.is_floating_point() or not outputs.numel():
        return
    low, high = (float(value) for value in outputs.aminmax())
    if low >= 0 and high <= 1:
        raise UserError(
            f"{project.model.where}: accuracy takes one column for a logit, yes above 0, and {what} from {low:.3g} to "
            f"{high:.3g}, as probabilities are; return the logit first and the probability after it, or two columns "
            "(no, yes), or measure with a metric of your own in train.metrics"
        )

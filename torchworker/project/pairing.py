"""Does a loss or a metric compare each output with its own target? Asked on made-up answers.

Outputs [batch, 1] and targets [batch] broadcast to [batch, batch]: every output is compared with every target, and what
is learnt is their mean. The shapes alone do not tell, as a loss may bring them together itself. But if all are compared
with all, it does not matter which target belongs to which output.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchworker import situations
from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.metrics import first_output
from torchworker.project.outputs import parts_of, with_parts
from torchworker.project.randomness import OwnRandom
from torchworker.project.user_code import Loss, call_metric, describe_tensor

ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss")
"""Losses of torch that broadcast, with no more than a warning."""
ALIKE = 1e-5
"""Relative difference below which two values are one, up to rounding."""


def require_pairs(loss: Loss | None, outputs: Any, target: Tensor, project: Project) -> None:
    """Ask the loss and the job's own metrics.

    Args:
        loss: from `build_loss`; None where a custom loop has its own.
        outputs: what forward gave on a batch; asked about is its first tensor, [batch, …].
        target: [batch, …].
        project: names them.

    Raises:
        UserError: one of them compares all outputs with all targets.
    """
    try:
        output = first_output(outputs)
    except TypeError:
        return
    if not _broadcast(output, target):
        return
    if loss is not None:
        _require_pairs_of_loss(loss, outputs, output, target, project)
    for metric in project.custom_metrics:
        measured = _measured_by(metric, project)
        if _compares_all(measured, output.cpu(), target.cpu()):
            raise _mistake(metric.reference.where, metric.reference.target, output, target)


def _require_pairs_of_loss(loss: Loss, outputs: Any, output: Tensor, target: Tensor, project: Project) -> None:
    named, ask = project.loss, asked_apart(loss)
    if isinstance(named, str):
        if named in ELEMENTWISE:
            raise _mistake("train.loss", named, output, target)
    elif _compares_all(lambda answer, truth: ask(with_first(outputs, answer), truth), output, target):
        raise _mistake(named.where, named.target, output, target)


def _measured_by(metric: Any, project: Project) -> Callable[[Tensor, Tensor], float]:
    return lambda answer, truth: call_metric(metric, answer, truth, project)


def _broadcast(output: Tensor, target: Tensor) -> bool:
    """Whether the two have as many elements, one for one, and would be stretched against each other."""
    if output.shape == target.shape or output.numel() != target.numel() or not output.is_floating_point():
        return False
    try:
        return len(target) > 1 and _stretched(output, target).numel() > target.numel()
    except RuntimeError:
        return False


def _stretched(output: Tensor, target: Tensor) -> torch.Size:
    """The shape that the two broadcast to. Raises RuntimeError where they do not."""
    shape: torch.Size = torch.broadcast_shapes(output.shape, target.shape)  # type: ignore[no-untyped-call]
    return shape


@torch.no_grad()
def _compares_all(measure: Callable[[Tensor, Tensor], Any], output: Tensor, target: Tensor) -> bool:
    """Whether it does not matter which target belongs to which output, although the targets matter."""
    truth = target.detach()
    values = truth.double()
    if not bool(torch.isfinite(values).all()) or float(values.std()) == 0:
        return False
    # What a good model would answer, whatever the scale that is expected.
    answer = ((values - values.mean()) / values.std()).to(output.dtype).reshape(output.shape)
    orders = (torch.roll(torch.arange(len(truth)), 1), torch.arange(len(truth)).flip(0))
    other = torch.where(truth == truth.max(), truth.min(), truth)
    try:
        right = float(measure(answer, truth))
        turned = [float(measure(answer, truth[order.to(truth.device)])) for order in orders]
        changed = float(measure(answer, other))
    except Exception:
        # It cannot be asked in this way: where it fails on real outputs, that is told elsewhere.
        return False
    return all(_alike(right, value) for value in turned) and not _alike(right, changed)


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= ALIKE * max(abs(one), abs(other))


def asked_apart(loss: Loss) -> Loss:
    """The loss, to be asked on made-up answers: what it remembers, and the process's random draws, stay as they are.

    What a plain function keeps outside of itself is not seen.
    """
    try:
        apart = loss if inspect.isfunction(loss) else copy.deepcopy(loss)
    except Exception:
        apart = loss
    draws = OwnRandom(0)

    def ask(outputs: Any, target: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # What torch says of shapes is said here in other words.
            warnings.simplefilter("ignore")
            return draws.call(lambda: apart(outputs, target))

    return ask


def with_first(outputs: Any, tensor: Tensor) -> Any:
    """Outputs of a model with another tensor in the place of the one that metrics see."""
    if isinstance(outputs, Tensor):
        return tensor
    parts = [part for _, part in parts_of(outputs) or ()]
    place = next(place for place, part in enumerate(parts) if part is not None)
    parts[place] = with_first(parts[place], tensor)
    return with_parts(outputs, parts)


def _mistake(where: str, name: str, output: Tensor, target: Tensor) -> UserError:
    shape = list(_stretched(output, target))
    return UserError(
        f"{where}: {name} {situations.BROADCAST}: outputs {describe_tensor(output)} and "
        f"target {describe_tensor(target)} broadcast to {shape}, and what a model learns from that, or is measured by, "
        "is the mean; give both one shape, as outputs.squeeze(1) or target.unsqueeze(1)"
    )

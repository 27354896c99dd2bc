"""Two questions to a model before it is trained, asked of a copy of it in training mode on a few samples."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchworker.contract import Project
from torchworker.process.failure import UserError, describe
from torchworker.project.parameters import set_training
from torchworker.project.user_code import Loss, compute_loss, forward
from torchworker.project.watch import decides_on_parameters, watched

FEW = 2
"""Samples on which a forward pass is watched."""


@torch.no_grad()
def deciding_line(model: nn.Module, inputs: Any, project: Project, frozen: Sequence[str] = ()) -> str:
    """Where forward decides, by chance or by values, what it uses in this step; empty when it does not.

    LayerDrop does, and so does a mixture of experts: they may use a module in one step and not in the next.

    Args:
        model: stays as it is.
        inputs: of one batch as the data gives them, on the model's device.
        project: for messages.
        frozen: patterns of `train.freeze`.
    """
    trial = _copied(model, frozen)
    if trial is None:
        return ""
    some = _rows(inputs, FEW)
    before = _other_draws()
    watch = watched(trial, some, project)
    drew = _other_draws() != before
    if watch is None:
        # What fails here fails in the first step, needs samples that belong together, or cannot be watched.
        return ""
    if decides_on_parameters(watch, trial, some, project):
        return str(watch.decisions[0]) or type(model).__name__
    return "random numbers of Python or NumPy" if drew and _draws_again(trial, some, project) else ""


def _draws_again(trial: nn.Module, some: Any, project: Project) -> bool:
    # Another thread may draw during a pass, as a client does that waits a random time: hardly during each of three.
    for _ in range(2):
        before = _other_draws()
        if watched(trial, some, project) is None or _other_draws() == before:
            return False
    return True


@torch.no_grad()
def refusal_of_one(
    model: nn.Module, loss: Loss, batch: tuple[Any, Tensor], project: Project, frozen: Sequence[str] = ()
) -> str:
    """Why it cannot be trained on one sample alone, as BatchNorm cannot; empty when it can.

    Args:
        model: stays as it is.
        loss: from `build_loss`.
        batch: (inputs, target), each [batch, …], on the model's device.
        project: for messages.
        frozen: patterns of `train.freeze`.
    """
    trial = _copied(model, frozen)
    if trial is None:
        return ""
    inputs, target = _rows(batch, 1)
    try:
        compute_loss(loss, forward(trial, inputs, project), target, project)
    except UserError as mistake:
        return describe(mistake.__cause__ or mistake).splitlines()[0]
    return ""


def _copied(model: nn.Module, frozen: Sequence[str]) -> nn.Module | None:
    """In training mode. None for a model that cannot be copied, of which nothing is known then."""
    try:
        trial = copy.deepcopy(model)
        set_training(trial, frozen)
        return trial
    except Exception:
        return None


def _rows(value: Any, count: int) -> Any:
    return tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, value)


def _other_draws() -> tuple[Any, ...]:
    """The state of generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    _, keys, position, *_ = numpy.random.get_state() if numpy is not None else ("", torch.empty(0).numpy(), 0)
    return random.getstate(), keys.tobytes(), position

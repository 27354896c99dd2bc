"""The moving average of a model's weights over the optimizer steps (`train.ema`), by torch's own AveragedModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchworker.contract import Project
from torchworker.process.failure import as_user_error
from torchworker.training.strategy import is_sharded


class Averaging:
    """Keeps a second model whose weights are the average.

    Its running statistics of normalization layers are averaged as the weights are: they are then those of about the
    same weights, at no pass over the training data (as `update_bn` takes, and which a stream may not give twice). What
    else is a buffer is the trained model's: averaging makes NaN of the -inf of a mask, and rounds whole numbers down.
    """

    def __init__(self, model: nn.Module, decay: float, project: Project) -> None:
        """
        Args:
            model: on its device, not shared between ranks yet.
            decay: how much of the average one step keeps.
            project: for messages.

        Raises:
            UserError: the model cannot be copied.
        """
        what = f"train.ema: {project.model.target} makes a model that cannot be copied (copy.deepcopy)"
        with as_user_error(what, project.folder):
            self._average = AveragedModel(model, multi_avg_fn=_of_shards(decay), use_buffers=True)
        self.model: Any = self._average.module
        """The model with averaged weights: what is validated and what ships."""
        statistics = {
            id(tensor)
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for tensor in (module.running_mean, module.running_var)
        }
        self._others = [place for place, tensor in enumerate(self.model.buffers()) if id(tensor) not in statistics]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After every optimizer step. The first time the average becomes what the model is."""
        if is_sharded(self.model):
            # A forward pass leaves what the outermost module holds gathered: a copy that would be thrown away.
            self.model.reshard()
        self._average.update_parameters(model)
        if self._others:
            averaged, current = list(self.model.buffers()), list(model.buffers())
            for place in self._others:
                averaged[place].copy_(current[place])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the tensors are the average's own, and to read into them is to go on from there."""
        return self._average.state_dict()


def _of_shards(decay: float) -> Any:
    """torch's own average, of this rank's part of each tensor: whole and sharded ones may stand in one list."""
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        update([_local(tensor) for tensor in averaged], [_local(tensor) for tensor in current], updates)

    return average


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found

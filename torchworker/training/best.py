"""Which epoch ships: the one where the watched number of the history was best, or the last one (`train.weights`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchworker.contract import TrainSettings
from torchworker.training.strategy import is_sharded

History = Sequence[Mapping[str, float]]


def best_epoch(history: History, settings: TrainSettings) -> int:
    """Where the watched number was best, the earlier epoch of two that are as good; 0 where there is none but NaN."""
    sign = 1 if settings.watched_better == "lower" else -1
    values = [(sign * row[settings.watched], int(row["epoch"])) for row in history]
    return min((item for item in values if not math.isnan(item[0])), default=(0.0, 0))[1]


def stops_early(history: History, settings: TrainSettings) -> bool:
    """Whether `early_stopping` epochs have passed without a better one."""
    patience = settings.early_stopping
    return patience is not None and len(history) - best_epoch(history, settings) >= patience


class BestWeights:
    """Keeps the weights of the best epoch so far on the CPU: rank 0 does, of a sharded model every rank its part.

    Every rank makes one, which keeps nothing unless `weights` is `best`.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        """
        Args:
            model: the one that is validated and ships, shared between the ranks already.
            settings: what is watched.
        """
        self._model, self._settings = model, settings
        self._keeps = is_sharded(model) or dist.get_rank() == 0
        self.epoch = 0
        """Whose weights are kept; 0 for none. The same on all ranks."""
        self.state: dict[str, Any] = {}
        """`best`: what this rank keeps of them, for a checkpoint; empty when nothing. Nobody changes the tensors."""

    def see(self, history: History) -> None:
        """After the validation of an epoch, the last of the history."""
        epoch = int(history[-1]["epoch"])
        if self._settings.weights == "best" and best_epoch(history, self._settings) == epoch:
            self.epoch = epoch
            self.state = self._copy()

    def expect(self, epoch: int) -> None:
        """Before a checkpoint is read that keeps the weights of this epoch: `state` is what it is read into."""
        self.epoch = epoch
        self.state = self._copy() if epoch else {}

    def put_back(self) -> None:
        """Give the model the weights that are kept, if there are any. Every rank calls it."""
        if self.state:
            self._model.load_state_dict(self.state["best"])

    @torch.no_grad()
    def _copy(self) -> dict[str, Any]:
        """Of a tensor that has several names there is one copy."""
        if not self._keeps:
            return {}
        values = self._model.state_dict(keep_vars=True)
        copies = {id(value): _copied(value) for value in values.values()}
        return {"best": {name: copies[id(value)] for name, value in values.items()}}


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

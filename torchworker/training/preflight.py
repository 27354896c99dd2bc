"""What the ranks ask on one batch before the first step: a mistake there must not cost an epoch to find."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchworker.contract import DynamicDim, Project, TrainSettings
from torchworker.data.groups import SampleGroups
from torchworker.data.loading import TrainingData
from torchworker.project import user_code
from torchworker.project.first_batch import try_batch, try_served
from torchworker.project.independence import require_independent
from torchworker.project.signature import require_batches_alike
from torchworker.training.device import place
from torchworker.training.strategy import unused_parameters
from torchworker.training.trial import deciding_line, refusal_of_one
from torchworker.training.weighting import ignored_labels, padding_of

Batch = tuple[Any, Tensor]


class Preflight:
    """Asks a model that is not shared yet. Every rank makes one and asks the same."""

    def __init__(
        self, model: nn.Module, loss: user_code.Loss, project: Project, settings: TrainSettings, device: torch.device
    ) -> None:
        """
        Args:
            model: on the device.
            loss: from `build_loss`.
            project: names both, and the metrics.
            settings: batch size, processes.
            device: of this rank.
        """
        self._model, self._loss, self._project = model, loss, project
        self._settings, self._device = settings, device
        self.ignored: list[int] = []
        """Classes that the loss ignores, known after `try_validation`."""
        self.padding: int | None = None
        """The label that a loss of the user's leaves out, known then too."""

    @torch.no_grad()
    def try_validation(
        self, dataset: Dataset[Any], formats: Sequence[str], dynamic: Sequence[DynamicDim] = ()
    ) -> Batch:
        """Loss, metrics and what will be exported, on the first batch of the validation split, which is returned.

        Args:
            dataset: of the split.
            formats: that have to hold the model's outputs.
            dynamic: declared dimensions beside the batch.

        Raises:
            UserError: one of them cannot be.
        """
        self._model.eval()
        size = max(1, self._settings.batch_size // dist.get_world_size())
        some = list(islice(user_code.batches(dataset, size, self._project, see=SampleGroups(self._project).add), 2))
        batch = some[0]
        require_batches_alike(self._model, (batch, some[-1]), dynamic, self._project)
        inputs, target = self._place(batch)
        itself = self._project.serving is None
        outputs, _ = try_batch(self._model, self._loss, (inputs, target), self._project, formats if itself else None)
        asked = "accuracy" in self._project.metrics
        found: list[Any] = [
            ignored_labels(self._loss, outputs, target) if asked else [], padding_of(self._loss, outputs, target),
        ]  # fmt: skip
        dist.broadcast_object_list(found, 0)
        self.ignored, self.padding = found
        # All ranks have the same model and data.
        if dist.get_rank() == 0 and itself:
            require_independent(self._model, inputs, self._project, outputs)
        elif dist.get_rank() == 0:
            try_served(self._model, dataset, outputs, size, self._project, formats, dynamic)
        return batch

    def try_training(self, data: TrainingData, example: Batch) -> tuple[bool, list[str]]:
        """Whether DDP has to look for unused parameters, and what a person should know of the data and of that.

        Args:
            data: of this rank; a last batch of one sample is joined to the one before it where it cannot be trained on.
            example: a batch (inputs, target), each [batch, …].
        """
        inputs, target = self._place(example)
        # Rank 0's answers: a wrong guess costs little, and two different ones cost the run.
        answers, frozen = [""] * 2, self._settings.freeze
        if dist.get_rank() == 0:
            answers[0] = deciding_line(self._model, inputs, self._project, frozen)
            if data.has_lone_batch:
                answers[1] = refusal_of_one(self._model, self._loss, (inputs, target), self._project, frozen)
        dist.broadcast_object_list(answers, 0)
        decides, refuses_one = answers
        if refuses_one:
            data.join_lone_batch(refuses_one)
        find_unused, notes = unused_parameters(self._settings, dist.get_world_size(), decides)
        return find_unused, [*data.notes, *notes]

    def _place(self, batch: Batch) -> Batch:
        placed: Batch = place(batch, self._device, self._settings.channels_last)
        return placed

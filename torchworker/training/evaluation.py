"""Loss and metrics over the validation set: exact at every world size, each sample counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project
from torchworker.data.loading import ValidationData
from torchworker.project.metrics import first_output, joined, metric_sum, without
from torchworker.project.signature import require_batches_alike
from torchworker.project.user_code import Loss, call_metric, compute_loss, forward
from torchworker.training.device import place
from torchworker.training.weighting import Weigh

Batch = tuple[Any, Tensor]


class Evaluation:
    """Measures a model on the validation data. Every rank makes one and calls it at the same points."""

    def __init__(
        self,
        data: ValidationData,
        example: Batch,
        loss: Loss,
        project: Project,
        device: torch.device,
        *,
        weigh: Weigh,
        ignored: Sequence[int],
        channels_last: bool,
        collective: bool,
        dynamic: Sequence[DynamicDim] = (),
    ) -> None:
        """
        Args:
            data: this rank's share of the validation split.
            example: a batch (inputs, target), each [batch, …], that a rank which has run out of its own goes on with,
                uncounted, when `collective`.
            loss: from `build_loss`.
            project: names the metrics.
            device: where the model is.
            weigh: what a batch weighs in the mean loss.
            ignored: labels that the loss ignores, and so accuracy.
            channels_last: images in NHWC order.
            collective: a forward pass needs all ranks, as that of a sharded model does.
            dynamic: declared dimensions beside the batch, in which batches may differ.
        """
        self.data, self._example, self._loss, self._project = data, example, loss, project
        self._weigh, self._ignored = weigh, ignored
        self._device, self._channels_last, self._collective = device, channels_last, collective
        self._dynamic = dynamic
        self.samples = 0
        """Validation samples over all ranks, known after the first call."""

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`validation_loss` and `validation_<metric>` in full precision, the same on every rank."""
        model.eval()
        # Running statistics differ by rank between forwards; rank 0's are the ones that are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        names = ("loss", *self._project.metrics)
        sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
        rows = 0
        kept: list[tuple[Tensor, Tensor]] = []
        for batch, counted in self._batches():
            if not self.samples:
                # Now rather than after training, when artifacts are held against these samples.
                require_batches_alike(model, (self._example, batch), self._dynamic, self._project)
            inputs, target = place(batch, self._device, self._channels_last)
            outputs = forward(model, inputs, self._project)
            if not counted:
                continue
            rows += len(target)
            if weight := self._weigh(batch[1]):
                sums["loss"][0] += float(compute_loss(self._loss, outputs, target, self._project)) * weight
                sums["loss"][1] += weight
            labels = without(target, self._ignored)
            for name in self._project.metrics:
                part, count = metric_sum(name, first_output(outputs), labels)
                sums[name][0] += part
                sums[name][1] += count
            if self._project.custom_metrics:
                kept.append((first_output(outputs).cpu(), target.cpu()))
        table = torch.tensor([*sums.values(), [0.0, rows]], dtype=torch.float64)
        dist.all_reduce(table)
        self.samples = int(table[-1, 1])
        means = {f"validation_{name}": float(row[0] / row[1]) for name, row in zip(names, table, strict=False)}
        means |= self._custom(kept)
        return means

    def _batches(self) -> Iterator[tuple[Batch, bool]]:
        """(batch, whether it counts)."""
        iterator = iter(self.data)
        while True:
            batch = next(iterator, None)
            if self._collective:
                anyone = torch.tensor([batch is not None], dtype=torch.int32)
                dist.all_reduce(anyone, dist.ReduceOp.MAX)
                if not anyone:
                    return
            elif batch is None:
                return
            yield (batch, True) if batch is not None else (self._example, False)

    def _custom(self, kept: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Metrics of the user's own see all outputs and targets at once, on rank 0."""
        if not self._project.custom_metrics:
            return {}
        mine = (joined([outputs for outputs, _ in kept]), joined([target for _, target in kept])) if kept else None
        rank, world = dist.get_rank(), dist.get_world_size()
        parts: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(mine, parts)
        values: list[Any] = [None]
        if parts is not None:
            outputs, target = (_in_order([part[side] for part in parts if part is not None], world) for side in (0, 1))
            values = [
                {
                    f"validation_{metric.name}": call_metric(metric, outputs, target, self._project)
                    for metric in self._project.custom_metrics
                }
            ]
        dist.broadcast_object_list(values, 0)
        found: dict[str, float] = values[0]
        return found


def _in_order(parts: Sequence[Tensor], world: int) -> Tensor:
    """Rows of all ranks in the order of the dataset, where a sample is a row: the ranks took turns."""
    whole = joined(parts)
    if [len(part) for part in parts] != [len(range(rank, len(whole), world)) for rank in range(len(parts))]:
        return whole
    ordered = torch.empty_like(whole)
    for rank, part in enumerate(parts):
        ordered[rank::world] = part
    return ordered

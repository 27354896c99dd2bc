"""Build everything a job refers to and try it once, before any of the expensive work starts."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from torchworker.contract import CheckRequest, CheckResult, Project
from torchworker.custom_loop.preflight import facts_of, resolve_main, try_parts
from torchworker.data.loading import TrainingData
from torchworker.process.failure import UserError
from torchworker.project.metrics import first_output
from torchworker.project.randomness import seed_everything
from torchworker.project.user_code import (
    Loss,
    apply_gradients,
    backward,
    batches,
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    call_metric,
    compute_loss,
    enter,
    forward,
    length_of,
    require_gradients,
    require_one_shape,
    try_metric,
)
from torchworker.training.device import choose_device
from torchworker.training.results import try_weights


def check(request: CheckRequest) -> CheckResult:
    """One forward and one loss on one batch of each split; a custom loop is found, and not run.

    Raises UserError with what to mend.
    """
    project, settings = request.project, request.train
    if request.ranks_here:
        choose_device(settings, request.ranks_here)
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)
    enter(project)
    if settings.entrypoint is not None:
        resolve_main(settings.entrypoint, project)
        return try_parts(project, request.dynamic, request.max_batch)
    loss = build_loss(project)
    model = build_model(project)
    optimizer = build_optimizer(project, settings, model)
    build_schedule(project, settings, optimizer, steps=1)
    model.eval()
    sizes = {}
    for split in ("validation", "train"):
        dataset = build_dataset(project, split)
        sizes[split] = length_of(dataset)
        some = list(islice(batches(dataset, settings.batch_size, project), 2))
        if split == "validation":
            require_one_shape(some[0], some[-1], project)
        inputs, target = some[0]
        with torch.no_grad():
            outputs = forward(model, inputs, project)
            value = compute_loss(loss, outputs, target, project)
            if not torch.isfinite(value):
                raise UserError(
                    f"train.loss: the untrained model's loss on one {split} batch is {float(value)}; expected a finite "
                    "number; look for NaN or inf in the inputs, and for a log or division of zero"
                )
            for name in project.metrics:
                try_metric(name, outputs, target)
            for metric in project.custom_metrics:
                call_metric(metric, first_output(outputs), target, project)
        if split == "train":
            # Whether an epoch has an end, and a sample for every process.
            TrainingData(dataset, project, settings, settings.processes, 0, pin_memory=False)
    _try_step(model, inputs, target, loss, optimizer, project)
    return facts_of(
        model.eval(), inputs, target, request.dynamic, project, train_samples=sizes["train"],
        validation_samples=sizes["validation"], loss=float(value), max_batch=request.max_batch,
    )  # fmt: skip


def _try_step(
    model: nn.Module, inputs: Any, target: torch.Tensor, loss: Loss, optimizer: torch.optim.Optimizer, project: Project
) -> None:
    """One training step, and the weights to a file and back: what would otherwise fail in or after training."""
    model.train()
    backward(compute_loss(loss, forward(model, inputs, project), target, project), project)
    require_gradients(model, project)
    apply_gradients(optimizer, project)
    try_weights(model, project)

"""Build everything a job refers to and try it once, before any of the expensive work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from torchworker.contract import CheckRequest, CheckResult, Project, TrainSettings
from torchworker.custom_loop.preflight import facts_of, resolve_main, try_parts
from torchworker.data.glance import shared
from torchworker.data.groups import SampleGroups
from torchworker.data.loading import TrainingData, reading
from torchworker.process.failure import UserError
from torchworker.project import user_code
from torchworker.project.first_batch import Shipped, try_batch, try_served
from torchworker.project.independence import require_independent
from torchworker.project.labels import other_order
from torchworker.project.parameters import freeze, set_training
from torchworker.project.randomness import seed_everything
from torchworker.project.signature import require_batches_alike
from torchworker.training.averaging import Averaging
from torchworker.training.device import choose_device
from torchworker.training.optimizer import (
    apply_gradients,
    build_optimizer,
    build_schedule,
    float16_cause,
    set_optimizer_mode,
)
from torchworker.training.results import try_weights
from torchworker.training.strategy import unused_parameters
from torchworker.training.trial import deciding_line, refusal_of_one
from torchworker.training.weighting import is_mean, no_mean, padding_of, weigh_of


def check(request: CheckRequest) -> CheckResult:
    """One forward and one loss on one batch of each split; a custom loop is found, and not run.

    Raises UserError with what to mend.
    """
    project, settings = request.project, request.train
    if request.ranks_here:
        choose_device(settings, request.ranks_here)
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)
    user_code.enter(project)
    if settings.entrypoint is not None:
        resolve_main(settings.entrypoint, project)
        found = try_parts(project, request.dynamic, request.max_batch, request.formats)
        return replace(found, shared=_shared(request, {}))
    loss = user_code.build_loss(project)
    model = user_code.build_model(project)
    frozen = freeze(model, settings.freeze, project)
    if settings.ema is not None:
        # A model that cannot be copied has no average.
        Averaging(model, settings.ema, project)
    optimizer = build_optimizer(project, settings, model)
    model.eval()
    sizes, datasets = {}, {}
    for split in ("validation", "train"):
        datasets[split] = dataset = user_code.build_dataset(project, split)
        sizes[split] = user_code.length_of(dataset)
        groups = SampleGroups(project)
        batches = user_code.batches(dataset, settings.batch_size, project, see=groups.add, split=split)
        some = list(islice(batches, 2))
        if split == "validation":
            require_batches_alike(model, (some[0], some[-1]), request.dynamic, project)
        inputs, target = some[0]
        exported = split == "validation" and project.serving is None
        outputs, first_loss = try_batch(model, loss, some[0], project, request.formats if exported else None)
        assert first_loss is not None, "there is a loss"
        value = float(first_loss)
        if not math.isfinite(value):
            raise UserError(
                f"train.loss: the untrained model's loss on one {split} batch is {value}; expected a finite "
                f"number; look for NaN or inf in the inputs, and for a log or division of zero{float16_cause(model)}"
            )
        # What ships has the shapes of validation samples; those of training may be others.
        if exported:
            independence = require_independent(model, inputs, project, outputs)
            shipped = Shipped(model, inputs, target, project, independence)
        elif split == "validation":
            asked = settings.batch_size, project, request.formats, request.dynamic
            shipped = try_served(model, dataset, outputs, *asked)
        if split == "train":
            # Whether an epoch has an end, and a sample for every process.
            data = TrainingData(dataset, project, settings, settings.processes, 0, pin_memory=False)
    if data.has_lone_batch and (why := refusal_of_one(model, loss, (inputs, target), project, settings.freeze)):
        data.join_lone_batch(why)
    build_schedule(project, settings, optimizer, data.epoch_steps * settings.epochs)
    decides = deciding_line(model, inputs, project, settings.freeze)
    find_unused, notes = unused_parameters(settings, settings.processes, decides)
    several = settings.processes * settings.accumulate > 1
    known = weigh_of(loss) is not None or padding_of(loss, outputs, target) is not None
    if several and not known and not is_mean(loss, outputs, target):
        notes.append(no_mean(project, settings))
    _try_step(model, inputs, target, loss, optimizer, project, settings, find_unused)
    facts = facts_of(
        shipped, request.dynamic, model.eval(), train_samples=sizes["train"],
        validation_samples=sizes["validation"], loss=value, max_batch=request.max_batch,
        notes=[*frozen, *data.last_batch_notes, *notes, *other_order(project, datasets["train"])],
    )  # fmt: skip
    return replace(facts, shared=_shared(request, datasets))


def _shared(request: CheckRequest, made: Mapping[str, Dataset[Any]]) -> tuple[int, int]:
    """made: split to its dataset, where there is one already."""
    if not request.glance:
        return 0, 0
    project = request.project
    splits = ("train", "validation")
    train, validation = (made[split] if split in made else user_code.build_dataset(project, split) for split in splits)
    with reading("an", project):
        return shared(train, validation)


def _try_step(
    model: nn.Module,
    inputs: Any,
    target: torch.Tensor,
    loss: user_code.Loss,
    optimizer: torch.optim.Optimizer,
    project: Project,
    settings: TrainSettings,
    find_unused: bool,
) -> None:
    """One training step, and the weights to a file and back: what would otherwise fail in or after training."""
    set_training(model, settings.freeze)
    set_optimizer_mode(optimizer, project, training=True)
    outputs = user_code.forward(model, inputs, project)
    user_code.backward(user_code.compute_loss(loss, outputs, target, project), project)
    if not find_unused:
        user_code.require_gradients(model, project)
    finite = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.isfinite().all()
    ]
    apply_gradients(optimizer, project)
    odd = [name for name in finite if not model.get_parameter(name).isfinite().all()]
    if odd:
        raise UserError(
            f"train.optimizer: after one step on one batch of training samples {len(odd)} parameters are not finite "
            f"({odd[0]}, …); look at learning_rate {settings.learning_rate}, and the gradients for NaN or inf"
            f"{float16_cause(model, optimizer)}"
        )
    set_optimizer_mode(optimizer, project, training=False)
    try_weights(model, project)

"""Build everything a job refers to and try it once, before any of the expensive work starts."""

from __future__ import annotations

import torch

from torchworker.contract import CheckRequest, CheckResult
from torchworker.failure import UserMistake, describe
from torchworker.metrics import first_output, metric_sum
from torchworker.project import (
    batches,
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    compute_loss,
    describe_tensor,
    enter,
    forward,
    name_inputs,
    name_outputs,
    specs,
)


def check(request: CheckRequest) -> CheckResult:
    """One forward and one loss on one batch of each split. Raises UserMistake with what to mend."""
    project, settings = request.project, request.train
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    enter(project)
    loss = build_loss(project)
    model = build_model(project)
    build_schedule(project, settings, build_optimizer(project, settings, model), steps=1)
    model.eval()
    sizes = {}
    for split in ("validation", "train"):
        dataset = build_dataset(project, split)
        sizes[split] = len(dataset)  # type: ignore[arg-type]
        inputs, target = next(batches(dataset, settings.batch_size, project))
        with torch.no_grad():
            outputs = forward(model, inputs, project)
            value = compute_loss(loss, outputs, target, project)
            if not torch.isfinite(value):
                raise UserMistake(
                    f"train.loss: the untrained model's loss on one {split} batch is {float(value)}; expected a finite "
                    "number; look for NaN or inf in the inputs, and for a log or division of zero"
                )
            for metric in project.metrics:
                _try_metric(metric, outputs, target)
    if sizes["train"] < settings.processes:
        raise UserMistake(
            f"train.processes: {settings.processes} processes need at least as many training samples, "
            f"got {sizes['train']}"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    named_target = {"target": target}
    return CheckResult(
        parameters=sum(parameter.numel() for parameter in trainable),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trainable),
        inputs=specs(name_inputs(model, inputs, project)),
        outputs=specs(name_outputs(outputs, project)),
        target=specs(named_target)[0],
        train_samples=sizes["train"],
        validation_samples=sizes["validation"],
        loss=float(value),
    )


def _try_metric(metric: str, outputs: object, target: torch.Tensor) -> None:
    try:
        metric_sum(metric, first_output(outputs), target)
    except (RuntimeError, TypeError, IndexError) as error:
        shown = describe_tensor(outputs) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise UserMistake(
            f"metrics: {metric} cannot be computed on outputs {shown} and target {describe_tensor(target)}: "
            f"{describe(error)}"
        ) from error

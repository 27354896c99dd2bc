"""The optimizer and the learning rate schedule that a job names, and how they are advanced."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchworker.contract import OPTIMIZERS, Project, Reference, TrainSettings
from torchworker.process.failure import UserError, as_user_error, is_lost_connection, user_error
from torchworker.project.library import asks_for, takes
from torchworker.project.parameters import parameter_groups
from torchworker.project.user_code import made_by, resolve

SMALLEST_FLOAT16 = 3e-8
"""What is smaller is rounded to 0."""


def build_optimizer(project: Project, settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """A well-known optimizer by name, or what a factory makes of what it asks for.

    Args:
        project: where the user's code is.
        settings: name the optimizer, or refer to a factory of the user's.
        model: whose parameters it changes, sharded already where it is to be.

    Raises:
        UserError: the factory fails or makes something else, or a group does not fit the model or the optimizer.
    """
    parameters = parameter_groups(model, settings.groups, project)
    if isinstance(settings.optimizer, str):
        kind = getattr(torch.optim, OPTIMIZERS[settings.optimizer])
        more = {"fused": True} if settings.fused else {}
        made = kind(parameters, lr=settings.learning_rate, **more)
    else:
        reference = settings.optimizer
        first, named = _asked_for(reference, project, settings, model, parameters)
        made = _made(reference, project, torch.optim.Optimizer, *first, **named, lr=settings.learning_rate)
        if settings.ema is not None and _has_modes(made):
            raise UserError(
                f"train.ema: {reference.target} has modes (train() and eval()), and what it trains is not what it "
                "means to be used: an average of that is neither; take train.ema out, its own weights are an average"
            )
    _require_options(made, settings)
    return typing.cast(torch.optim.Optimizer, made)


def _asked_for(
    reference: Reference, project: Project, settings: TrainSettings, model: nn.Module, parameters: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a factory is called with beside lr, by position and by name: the parameters, unless it asks for others."""
    factory = resolve(reference, project)
    trained = [(name, item) for name, item in model.named_parameters() if item.requires_grad]
    offered = {"model": model, "named_parameters": trained}
    named = {name: value for name, value in offered.items() if asks_for(factory, name)}
    if not named:
        return (parameters,), {}
    if asks_for(factory, "parameters"):
        return (), {**named, "parameters": parameters}
    if settings.groups:
        raise UserError(
            f"train.groups: {reference.target} asks for {' and '.join(named)}, and so makes groups of its own; take "
            "train.groups out, or have it take parameters, which are those groups"
        )
    return (), named


def _require_options(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
    """Raises UserError for an option of a group that the optimizer has not: torch takes any and reads none of them."""
    known = getattr(optimizer, "defaults", {})
    for place, group in enumerate(settings.groups):
        for name in group.options if known else ():
            if name not in known:
                raise UserError(
                    f"train.groups[{place}]: {type(optimizer).__name__} has no option {name!r}; it has "
                    f"{', '.join(sorted(known))}"
                )


def _made(reference: Reference, project: Project, kind: type, *given: Any, **defaults: Any) -> Any:
    """As `made_by`; raises UserError too when it is not of this kind."""
    made = made_by(reference, project, *given, **defaults)
    if not isinstance(made, kind):
        expected = f"{kind.__module__.removesuffix('.optimizer')}.{kind.__name__}"
        raise UserError(f"{reference.where}: {reference.target} must return a {expected}, got {type(made).__name__}")
    return made


def float16_cause(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """What float16 has to do with numbers that are not finite, and what to do; empty where no parameter is float16.

    Args:
        model: whose parameters are looked at.
        optimizer: whose `eps` is; None where it has not made a step.
    """
    half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
    if not half:
        return ""
    said = f"; {len(half)} parameters are float16 ({half[0]}, …): numbers above 65504 are inf there, below 3e-8 0"
    way = ""
    eps = min((group["eps"] for group in optimizer.param_groups if "eps" in group), default=1.0) if optimizer else 1.0
    if eps < SMALLEST_FLOAT16:
        kind = type(optimizer).__name__
        said += f", and so is the eps of {kind} ({eps:g}), which divides by 0 where a gradient is small"
        way = f", or give {kind} a larger one (train.groups: [{{names: ['*'], args: {{eps: 1.0e-4}}}}]), or take sgd"
    return (
        f"{said}; leave the model float32 and write train.precision: bf16 or fp16, or make it bfloat16 in "
        f"model.factory (.bfloat16()){way}"
    )


def build_schedule(
    project: Project, settings: TrainSettings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate schedule that is advanced after every optimizer step, unless it `follows_loss`.

    Args:
        project: where the user's code is.
        settings: name the schedule, or refer to a factory of the user's.
        optimizer: whose learning rate it sets.
        steps: how many optimizer steps there will be.

    Raises:
        UserError: the factory fails, or makes something else.
    """
    reference = settings.schedule
    if settings.warmup:
        assert isinstance(reference, str), "a schedule by name"
        warmup = _warmup_steps(settings.warmup, steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmed_up(reference, warmup, steps, step))
    if reference == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if reference == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if reference == "linear":
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    assert isinstance(reference, Reference), reference
    given = {"total_steps": steps} if takes(resolve(reference, project), "total_steps") else {}
    before = {group["lr"] for group in optimizer.param_groups}
    made = _made(reference, project, torch.optim.lr_scheduler.LRScheduler, optimizer, **given)
    after = {group["lr"] for group in optimizer.param_groups}
    # All may begin at 0.
    if len(before) > 1 and len(after) == 1 and after != {0}:
        raise UserError(
            f"{reference.where}: {reference.target} gives all parameters one learning rate, and train.groups has "
            f"{', '.join(f'{rate:g}' for rate in sorted(before))}; take learning_rate out of the groups, or give a "
            "schedule that scales what each group has"
        )
    if getattr(made, "mode", "") == "max" and follows_loss(made):
        raise UserError(
            f"{reference.where}: {reference.target} is given the validation loss after each epoch, of which less is "
            "better; expected mode: min, got max"
        )
    return typing.cast(torch.optim.lr_scheduler.LRScheduler, made)


def _warmup_steps(warmup: float, steps: int) -> int:
    """Raises UserError where nothing would be left after it."""
    number = max(1, round(warmup * steps)) if warmup < 1 else int(warmup)
    if number >= steps:
        raise UserError(
            f"train.warmup: expected less than the {steps:,} optimizer steps of this training, got {number:,}; give a "
            "share of them, such as 0.05"
        )
    return number


def _warmed_up(schedule: str, warmup: int, steps: int, step: int) -> float:
    """By what the learning rate is multiplied in a step: in a line up to 1, from there on as the schedule says.

    Args:
        schedule: a name in SCHEDULES.
        warmup: steps before the rate has its full height.
        steps: of the whole training.
        step: from 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    passed = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - passed}.get(schedule, (1 + math.cos(math.pi * passed)) / 2)


def follows_loss(schedule: torch.optim.lr_scheduler.LRScheduler) -> bool:
    """Whether a schedule is advanced once an epoch, by the validation loss, as ReduceLROnPlateau is."""
    return isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)


def apply_gradients(
    optimizer: torch.optim.Optimizer, project: Project, scaler: torch.amp.GradScaler | None = None
) -> None:
    """One step of the optimizer. scaler: of the loss, when it was scaled.

    Raises UserError for whatever it raises, unless that is of the machine: another rank that is gone, CUDA, the system.
    """
    try:
        if scaler is not None and scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    except Exception as error:
        machine = (OSError, torch.OutOfMemoryError, torch.AcceleratorError)
        if isinstance(error, (UserError, *machine)) or is_lost_connection(error):
            raise
        raise user_error("train.optimizer: step() failed", error, project.folder) from error


def _has_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def set_optimizer_mode(optimizer: torch.optim.Optimizer, project: Project, *, training: bool) -> None:
    """Tell an optimizer that has modes, as schedule-free ones do, whether weights are trained or used now."""
    if _has_modes(optimizer):
        with as_user_error("train.optimizer: its change of mode failed", project.folder):
            getattr(optimizer, "train" if training else "eval")()
        # schedulefree's train() leaves an empty entry for each parameter, which torch's get_optimizer_state_dict takes
        # for a state that is there: it makes none, and what a checkpoint holds of it would not be loaded.
        for parameter in [parameter for parameter, state in optimizer.state.items() if not state]:
            del optimizer.state[parameter]

"""Which of a model's parameters are trained, and with which options: patterns of their names, as `fnmatch` has them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchworker.contract import ParameterGroup, Project
from torchworker.process.failure import UserError


def freeze(model: nn.Module, patterns: Sequence[str], project: Project) -> list[str]:
    """Take what the patterns name out of training, before the model is shared between ranks.

    Args:
        model: any, not shared yet.
        patterns: of parameter names, of `train.freeze`.
        project: for messages.

    Returns:
        What a person should know of it.

    Raises:
        UserError: a pattern names nothing, or nothing is left to train.
    """
    if not patterns:
        return []
    for pattern in patterns:
        for parameter in require_match(model, pattern, "train.freeze", project).values():
            parameter.requires_grad_(False)
    parameters = list(model.parameters())
    left = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if not left:
        raise UserError(
            f"train.freeze: {', '.join(patterns)} leaves nothing of {project.model.target} to train; expected at least "
            "one parameter that no pattern names, such as those of the last layer"
        )
    return [f"train.freeze: {left:,} of {sum(item.numel() for item in parameters):,} parameters are trained"]


def set_training(model: nn.Module, frozen: Sequence[str]) -> None:
    """The training mode, in which modules stay in eval mode that have no parameters but frozen ones.

    So the running statistics of a frozen backbone's BatchNorm stay as they are, and its dropout is off. Recurrent
    layers alone are in training mode all the same: cuDNN gives no gradients to what is before one in eval mode.

    Args:
        model: whichever way it is shared, or a copy of it.
        frozen: patterns of parameter names, of `train.freeze`.
    """
    model.train()
    if not frozen:
        return
    named = {id(parameter) for pattern in frozen for parameter in matching(model, pattern).values()}
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters()}
        if own and own <= named:
            module.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()


def parameter_groups(
    model: nn.Module, groups: Sequence[ParameterGroup], project: Project
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """What is trained, as torch's optimizers take it: parameters, or groups of them where the job has some.

    First comes the group of what nobody names, then as their parameters follow in the model. A parameter that several
    of the job's groups name has the options of all of them, and of two that say the same the first one's.

    Args:
        model: on its device, sharded already where it is to be.
        groups: of `train.groups`.
        project: for messages.

    Raises:
        UserError: a pattern names nothing that is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not groups:
        return trained
    named: list[set[int]] = []
    for place, group in enumerate(groups):
        of_group: set[int] = set()
        for pattern in group.names:
            key = f"train.groups[{place}].names"
            found = [item for item in require_match(model, pattern, key, project).values() if item.requires_grad]
            if not found:
                raise UserError(
                    f"{key}: {pattern!r} names frozen parameters alone; expected some that are trained: take it out, "
                    "or take them out of what is frozen"
                )
            of_group |= {id(item) for item in found}
        named.append(of_group)
    alike: dict[tuple[int, ...], list[nn.Parameter]] = {(): []}
    for parameter in trained:
        places = tuple(place for place, of_group in enumerate(named) if id(parameter) in of_group)
        alike.setdefault(places, []).append(parameter)
    made = []
    for places, parameters in alike.items():
        options: dict[str, Any] = {}
        for place in reversed(places):
            options |= groups[place].options
        if parameters:
            # Betas are a tuple in torch, which JSON has no word for.
            plain = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
            made.append({"params": parameters, **plain})
    return made


def matching(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Parameters by names that the pattern fits; one that is shared has several names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if fnmatch.fnmatchcase(name, pattern)
    }


def require_match(model: nn.Module, pattern: str, key: str, project: Project) -> dict[str, nn.Parameter]:
    """As `matching`; raises UserError with what is near where there is none. key: of the job, that has the pattern."""
    found = matching(model, pattern)
    if not found:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        below = [f"{name}.*" for name, module in model.named_modules() if name and list(module.parameters())]
        near = difflib.get_close_matches(pattern, [*below, *names], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its parameters are {', '.join(names[:5])}"
        more = f" and {len(names) - 5} more" if not near and len(names) > 5 else ""
        raise UserError(f"{key}: {pattern!r} names no parameter of what {project.model.target} makes; {hint}{more}")
    return found

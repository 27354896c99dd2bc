"""What a custom loop gave back: one trained model, the same in every rank, whose weights fit `model.factory`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.user_code import build_model, describe_tensor, uncompiled
from torchworker.project.weights import values_of
from torchworker.training.strategy import is_sharded

SHOWN = 3
"""Tensors that a message names."""


def unwrapped(returned: Any, name: str) -> nn.Module:
    """The model itself, out of DistributedDataParallel and torch.compile. name: of the loop, for messages.

    Raises UserError for anything but an nn.Module.
    """
    while True:
        if isinstance(returned, DistributedDataParallel):
            returned = returned.module
        elif isinstance(returned, nn.Module) and isinstance(getattr(returned, "_orig_mod", None), nn.Module):
            returned = returned._orig_mod
        else:
            break
    if not isinstance(returned, nn.Module):
        raise UserError(
            f"{name} must return the trained torch.nn.Module in every rank, got {type(returned).__name__} in rank "
            f"{dist.get_rank()}"
        )
    return uncompiled(returned)


def require_sound(model: nn.Module, name: str, project: Project) -> None:
    """Raises UserError unless the weights are those of model.factory, finite, and the same in every rank.

    Every rank calls it. Buffers, such as running statistics, may differ by rank: rank 0's are shipped.
    """
    _require_fit(model, name, project)
    sharded = [key for key, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded and not is_sharded(model):
        raise UserError(
            f"{name} returned a model of which a part is sharded ({_listed(sharded)}); call fully_shard on the whole "
            "model too, or gather its weights before returning"
        )
    mine: dict[str, str] = {}
    for key, parameter in model.named_parameters():
        value = parameter.detach()
        # A shard is different by design; whether it is finite is seen in each rank.
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.is_floating_point() and not bool(torch.isfinite(local).all()):
            raise UserError(
                f"{name} returned a model with NaN or infinity in {key}; look at the learning rate and at the data"
            )
        mine[key] = "" if isinstance(value, DTensor) else _digest(local)
    every: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for rank, theirs in enumerate(every):
        differing = [key for key in theirs if theirs[key] != every[0].get(key)]
        if differing:
            raise UserError(
                f"{name} returned different weights in different ranks: rank {rank} differs from rank 0 in "
                f"{_listed(differing)}; train through DistributedDataParallel or fully_shard, or broadcast rank 0's "
                "weights before returning"
            )


def _require_fit(model: nn.Module, name: str, project: Project) -> None:
    there, here = _shapes(build_model(project)), _shapes(model)
    wrong = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{name} returned a model whose weights are not those of {project.model.where} {project.model.target}: "
            f"{key} is {here.get(key, 'missing')}, expected {there.get(key, 'none of that name')}"
            f"{f' ({len(wrong)} differ)' if len(wrong) > 1 else ''}; return the model that context.build_model() gave, "
            "trained, in its own dtype"
        )


def _shapes(model: nn.Module) -> dict[str, str]:
    return {key: describe_tensor(value) for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _digest(tensor: Tensor) -> str:
    content = values_of(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"

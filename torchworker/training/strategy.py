"""How ranks share a model: each has all of it and gradients are averaged (DDP), or each has a part (FSDP2)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchworker import situations
from torchworker.contract import Project, TrainSettings
from torchworker.process.failure import UserError, is_lost_connection, user_error


class Replicated:
    """DistributedDataParallel: gradients in buckets, exchanged while the backward pass goes on."""

    collective_forward = False
    """Whether a forward pass in evaluation needs all ranks."""

    def __init__(
        self, model: nn.Module, project: Project, settings: TrainSettings, device: torch.device, find_unused: bool
    ) -> None:
        """Args: as `share_model` has them."""
        try:
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                find_unused_parameters=find_unused,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise _cannot_be_shared(error, project) from error
        if settings.comm_hook is not None:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            self._ddp.register_comm_hook(dist.group.WORLD, hooks[settings.comm_hook])
        # One process has nobody to wait for, and so no parameter that it waits for either.
        self._exchanges = dist.get_world_size() > 1 or settings.comm_hook is not None
        self.call: Any = torch.compile(self._ddp) if settings.compile else self._ddp
        """What a training step calls instead of the model."""

    def exchange_gradients(self, now: bool) -> None:
        """Whether the next backward pass averages gradients over the ranks; false while they are accumulated."""
        self._ddp.require_backward_grad_sync = now and self._exchanges

    def release(self) -> None:
        """Let go of the process group; nothing can be trained afterwards."""
        del self.call, self._ddp


class Sharded:
    """FSDP2 (`fully_shard`): parameters, gradients and optimizer state are spread over the ranks."""

    collective_forward = True

    def __init__(
        self, model: nn.Module, project: Project, settings: TrainSettings, device: torch.device, find_unused: bool
    ) -> None:
        """Args: as `share_model` has them; nothing is looked for here."""
        self._fsdp: Any = shard(model, project, device)
        self.call: Any = model

    def exchange_gradients(self, now: bool) -> None:
        """As `Replicated` does."""
        self._fsdp.set_requires_gradient_sync(now)

    def release(self) -> None:
        """As `Replicated` does."""
        del self.call, self._fsdp


Strategy = Replicated | Sharded


def share_model(
    model: nn.Module, project: Project, settings: TrainSettings, device: torch.device, *, find_unused: bool
) -> Strategy:
    """Every rank calls it.

    Args:
        model: on this rank's device; sharding replaces its parameters.
        project: for messages.
        settings: which strategy, hook and compiler.
        device: this rank's own.
        find_unused: DDP looks in each step for parameters that take no part in it, and waits for none of them.

    Raises:
        UserError: the model cannot be shared between processes.
    """
    kind = Sharded if settings.strategy == "fsdp" else Replicated
    return kind(model, project, settings, device, find_unused)


def unused_parameters(settings: TrainSettings, world: int, decides: str) -> tuple[bool, list[str]]:
    """Whether some steps may leave parameters out, and what is to be said of it.

    Args:
        settings: which strategy, and what the job says itself.
        world: how many ranks there are.
        decides: where forward decides what it does in a step, from `deciding_line`; empty when it does not.
    """
    if settings.find_unused_parameters is not None:
        return settings.find_unused_parameters, []
    if not decides or world == 1:
        return bool(decides), []
    if settings.strategy == "fsdp":
        return False, [
            f"forward decides what it calls ({decides}); with strategy: fsdp all processes have to call the same "
            "modules in a step, or they wait for each other"
        ]
    return True, [
        f"forward decides what it calls ({decides}), so ddp looks in each step for parameters that take no part; "
        "train.find_unused_parameters: false spares that where all of them always do"
    ]


@contextlib.contextmanager
def naming_unused(model: nn.Module, project: Project) -> Iterator[None]:
    """Around a training step's forward pass: DDP's word about an unused parameter of the last one names the key."""
    try:
        yield
    except UserError as mistake:
        found = re.search(r"did not receive grad for rank (\d+): ([\d ]+)", str(mistake))
        if "Expected to have finished reduction" not in str(mistake) or found is None:
            raise
        trained = [name for name, item in model.named_parameters() if item.requires_grad]
        unused = [trained[int(position)] for position in found[2].split()]
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"{project.model.where}: the last step of rank {found[1]} did not use {', '.join(unused[:5])}{more}, and "
            f"the other processes wait for their gradients; {situations.UNUSED_PARAMETERS} for a model that "
            "uses some modules now and then"
        ) from None


def shard(model: nn.Module, project: Project, device: torch.device) -> Any:
    """Make a model one of parts, in place. Every rank calls it.

    The units that are gathered together are the composite items of every ModuleList and Sequential (the layers of a
    transformer, the stages of a network), and what is left.

    Raises:
        UserError: the model cannot be shared between processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        for unit in sharding_units(model):
            fully_shard(unit, mesh=mesh)
        sharded: Any = fully_shard(model, mesh=mesh)
        return sharded
    except (RuntimeError, ValueError, TypeError) as error:
        raise _cannot_be_shared(error, project) from error


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Composite items of lists of modules that have parameters, inner ones first."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found += [item for item in module if any(item.children()) and any(True for _ in item.parameters())]
    return list(dict.fromkeys(reversed(found)))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has made it one of parts."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def sharded_state(model: nn.Module) -> dict[str, Any]:
    """State of a model that FSDP2 has made one of parts, by the names that it has without wrappers.

    Of each parameter, a DTensor with this rank's part. Every rank calls it.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return dict(get_model_state_dict(model))


def whole_tensor(part: Tensor) -> Tensor:
    """A tensor of `sharded_state`, put together in every rank. Every rank calls it, in the same order."""
    from torch.distributed.tensor import DTensor

    return part.full_tensor() if isinstance(part, DTensor) else part


def _cannot_be_shared(error: Exception, project: Project) -> Exception:
    if is_lost_connection(error):
        return error
    what = f"{project.model.where}: its parameters and buffers cannot be shared between processes"
    return user_error(what, error, project.folder)


def make_scaler(settings: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for fp16, whose gradients would vanish; does nothing for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """The context of a forward pass and its loss at the job's precision."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}
    kind = kinds[settings.precision]
    return torch.autocast(device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)

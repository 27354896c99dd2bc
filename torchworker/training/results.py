"""How training ends, whatever loop it was: what rank 0 leaves for the export, and how all ranks part."""

from __future__ import annotations

import gc
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from torchworker.contract import PROBE, WEIGHTS, Project, TrainSettings
from torchworker.process.failure import as_user_error
from torchworker.project.user_code import batches, build_model, forward, name_inputs, name_outputs
from torchworker.project.weights import load_weights, save_in_turn, save_tensors, save_weights, tied_names
from torchworker.training.device import place
from torchworker.training.strategy import is_sharded, sharded_state, whole_tensor

PROBE_SAMPLES = 64
"""Samples on which the export has to give what the trained model gave."""


def save_trained(
    model: nn.Module, validation_set: Dataset[Any], project: Project, folder: Path, device: torch.device
) -> None:
    """Rank 0 writes WEIGHTS and PROBE into the folder; every rank calls it, as all hold a part of a sharded model.

    The probe is what the trained model itself gives on one batch: the export's model, rebuilt from weights, must agree.

    Args:
        model: without a wrapper such as DDP. It ends up in eval(), and on rank 0 on the CPU unless it is sharded.
        validation_set: the probe's batch is its first PROBE_SAMPLES samples.
        project: says how to collate.
        folder: of the run, on a file system that all ranks share.
        device: where the model is.
    """
    save_whole(model, folder)
    save_probe(model, validation_set, project, folder, device)


def save_whole(model: nn.Module, folder: Path) -> None:
    """The first half of `save_trained`, which needs no data: rank 0 writes WEIGHTS, and every rank calls it."""
    first = dist.get_rank() == 0
    if not is_sharded(model):
        if first:
            save_weights(model.cpu(), folder / WEIGHTS)
        return
    state = sharded_state(model)
    tied: list[Any] = [tied_names(state)]
    dist.broadcast_object_list(tied, 0)
    # Never all of them in one process: each is put together when it is written, and gone with the next one.
    save_in_turn(state, tied[0], whole_tensor, folder / WEIGHTS if first else None)


@torch.no_grad()
def save_probe(
    model: nn.Module, validation_set: Dataset[Any], project: Project, folder: Path, device: torch.device
) -> None:
    """As `save_trained`, of which it is the second half: rank 0 writes PROBE."""
    model.eval()
    sharded, first = is_sharded(model), dist.get_rank() == 0
    if not sharded and not first:
        return
    inputs, _ = next(batches(validation_set, PROBE_SAMPLES, project))
    if sharded:
        # Full float32 where the device would take less by itself: the export is compared on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        inputs = place(inputs, device, channels_last=False)
    outputs = name_outputs(forward(model, inputs, project), project)
    tensors = {f"input.{name}": tensor for name, tensor in name_inputs(model, inputs, project).items()}
    tensors |= {f"output.{name}": tensor for name, tensor in outputs.items()}
    if first:
        save_tensors(tensors, folder / PROBE)


def try_weights(model: nn.Module, project: Project) -> None:
    """The weights to a file and back. Raises UserError for what would fail when training is over."""
    what = f"{project.model.where}: its weights cannot be saved and loaded"
    with as_user_error(what, project.folder), tempfile.TemporaryDirectory() as folder:
        save_weights(model, Path(folder) / WEIGHTS)
        load_weights(build_model(project), Path(folder) / WEIGHTS)


def environment(device: torch.device, settings: TrainSettings) -> dict[str, str]:
    """Versions, thread counts and hardware that can change the bits."""
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processes": str(dist.get_world_size()),
        "threads_per_process": str(torch.get_num_threads()),
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **gpu,
        # What a custom loop makes of them is its own.
        **({} if settings.entrypoint else {"strategy": settings.strategy, "precision": settings.precision}),
        "backend": str(dist.get_backend()),
    }


def whole_cpu_seconds() -> float:
    """CPU seconds of all ranks and what they started, user and system. Every rank calls it."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = torch.tensor(sum(usage.ru_utime + usage.ru_stime for usage in spent), dtype=torch.float64)
    dist.all_reduce(seconds)
    return float(seconds)


def leave() -> None:
    """End the process group. The caller keeps no DistributedDataParallel."""
    # Nobody leaves before the weights are on disk: an early exit would look like a lost rank.
    dist.barrier()
    # DDP must not be the last owner of the group: its destructor joins gloo's threads while it holds the
    # interpreter lock that those threads may be waiting for (seen once in some hundred runs).
    gc.collect()
    dist.destroy_process_group()

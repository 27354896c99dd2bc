"""How training ends, whatever loop it was: what rank 0 leaves for the export, and how all ranks part."""

from __future__ import annotations

import gc
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from torchworker.contract import PROBE, WEIGHTS, Project
from torchworker.project import batches, forward, name_inputs, name_outputs
from torchworker.weights import save_weights

PROBE_SAMPLES = 64
"""Samples on which the export has to give what the trained model gave."""


@torch.no_grad()
def save_trained(model: nn.Module, validation_set: Dataset[Any], project: Project, folder: Path) -> None:
    """Write WEIGHTS and PROBE into the folder. model: in eval(), without a wrapper such as DDP.

    The probe is what the trained model itself gives on one batch: the export's model, rebuilt from weights, must agree.
    """
    save_weights(model, folder / WEIGHTS)
    inputs, _ = next(batches(validation_set, PROBE_SAMPLES, project))
    outputs = name_outputs(forward(model, inputs, project), project)
    tensors = {f"input.{name}": tensor for name, tensor in name_inputs(model, inputs, project).items()}
    tensors |= {f"output.{name}": tensor for name, tensor in outputs.items()}
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / PROBE)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and thread counts that can change the bits."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processes": str(dist.get_world_size()),
        "threads_per_process": str(torch.get_num_threads()),
        "device": str(device),
        "backend": str(dist.get_backend()),
    }


def leave() -> None:
    """End the process group. The caller keeps no DistributedDataParallel."""
    # Nobody leaves before the weights are on disk: an early exit would look like a lost rank.
    dist.barrier()
    # DDP must not be the last owner of the group: its destructor joins gloo's threads while it holds the
    # interpreter lock that those threads may be waiting for (seen once in some hundred runs).
    gc.collect()
    dist.destroy_process_group()

"""Model weights as safetensors: no pickle, tied parameters stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from torchworker.process.failure import UserError


def save_weights(model: nn.Module, path: Path) -> None:
    """Parameters and buffers of the model on the CPU."""
    save_model(model, str(path))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load in place. Raises RuntimeError when names or shapes do not match."""
    load_model(model, str(path), strict=True)


def start_from(model: nn.Module, path: Path) -> None:
    """Load the weights of an earlier release in place. Raises UserError with what differs when they do not fit."""
    try:
        load_weights(model, path)
    except RuntimeError as error:
        differs = "; ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip()) or str(error)
        raise UserError(
            f"retrain.start: live: the weights of release {path.parent.name} do not fit the model that model.factory "
            f"makes: {differs}; use retrain.start: scratch, or bring back the model that the release was trained with"
        ) from None


def state_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, to see whether an export changed the model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

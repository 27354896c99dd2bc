"""Parcels: will it be late? Every delivery of data is one more file in the snapshot. Plain PyTorch."""

from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

LARGEST = (1000.0, 30.0, 1.0, 24.0, 50.0, 40.0)
"""km, kg, load of the depot, hour of day, mm of rain, stops."""


class ParcelNet(nn.Module):
    """Parcels [batch, 6] float32 in their own units → logits [batch, 2]: in time, late."""

    largest: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(LARGEST))
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, parcel: Tensor) -> Tensor:
        logits: Tensor = self.layers(parcel / self.largest * 2 - 1)
        return logits


def build_model(width: int) -> nn.Module:
    return ParcelNet(width)


def build_dataset(split: str, snapshot: str) -> TensorDataset:
    """Every delivery so far, or the parcels that were held out before the first."""
    files = sorted(Path(snapshot).glob("held-out.npz" if split == "validation" else "delivery-*.npz"))
    found = [numpy.load(file) for file in files]
    parcels, late = (numpy.concatenate([file[name] for file in found]) for name in ("parcels", "late"))
    return TensorDataset(torch.from_numpy(parcels), torch.from_numpy(late))

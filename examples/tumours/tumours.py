"""Tumours: 569 real biopsies, 30 measurements of cell nuclei each (UCI, shipped inside scikit-learn). Plain PyTorch."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class TumourNet(nn.Module):
    """Measurements [batch, 30] float32 in their own units → logit [batch] of being malignant."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        # Learns mean and spread of each column, so that what is shipped takes raw measurements.
        self.standardise = nn.BatchNorm1d(30, affine=False, momentum=0.05)
        self.layers = nn.Sequential(
            nn.Linear(30, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, measurements: Tensor) -> Tensor:
        return self.layers(self.standardise(measurements)).squeeze(1)


def build_model(width: int, dropout: float) -> nn.Module:
    return TumourNet(width, dropout)


def build_dataset(split: str) -> TensorDataset:
    """426 training or 143 held-out biopsies, every fourth one held out."""
    table = load_breast_cancer()
    measurements = torch.tensor(table.data, dtype=torch.float32)
    malignant = torch.tensor(table.target == 0, dtype=torch.float32)
    held_out = torch.arange(len(malignant)) % 4 == 0
    chosen = held_out if split == "validation" else ~held_out
    return TensorDataset(measurements[chosen], malignant[chosen])


def recall(logits: Tensor, malignant: Tensor) -> Tensor:
    """Share of the malignant tumours that are found."""
    return (logits[malignant == 1] > 0).float().mean()

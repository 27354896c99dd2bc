"""Handwritten digits: 1,797 real 8×8 scans (UCI ML repository, shipped inside scikit-learn). Plain PyTorch."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class DigitsNet(nn.Module):
    """A small convolutional classifier: images [batch, 1, 8, 8] float32 in 0..1 → logits [batch, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.dropout(self.features(image).flatten(1)))


def build_model(width: int = 32) -> nn.Module:
    return DigitsNet(width)


def build_dataset(split: str) -> TensorDataset:
    """1,437 training or 360 held-out digits, divided once with a fixed seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:1437] if split == "train" else order[1437:]
    return TensorDataset(images[chosen], labels[chosen])

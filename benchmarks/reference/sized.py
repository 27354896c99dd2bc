"""A transformer of as many parameters as asked, with random weights, and noise to train it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

LENGTH, FEATURES, CLASSES, HEAD = 4, 64, 10, 64
SHAPES = {100: (1024, 8), 400: (1280, 20), 600: (1536, 21), 1200: (2048, 24)}
"""Millions of parameters to width and layers; a layer has 12 times the width squared."""


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm: [batch, length, width] → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.mix(self.before(states)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        states = states + self.back(mixed.transpose(1, 2).flatten(2))
        return states + self.narrow(functional.gelu(self.widen(self.behind(states))))


class Sized(nn.Module):
    """Features [batch, LENGTH, FEATURES] → logits [batch, CLASSES]."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        width, layers = SHAPES[millions]
        self.enter = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        states = self.enter(features)
        for block in self.blocks:
            states = block(states)
        return self.classify(states.mean(1))


def build_model(millions: int) -> Sized:
    return Sized(millions)


def build_dataset(split: str) -> TensorDataset:
    """16 samples of noise each."""
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    return TensorDataset(torch.randn(16, LENGTH, FEATURES, generator=generator), torch.arange(16) % CLASSES)

"""A model with an operator of its own, in C++: clamp.cpp, built as libclamp.so beside this file."""

from pathlib import Path

import torch
from torch import Tensor, nn
from zoo import features

torch.ops.load_library(str(Path(__file__).with_name("libclamp.so")))


class Custom(nn.Module):
    """features [B, 4] → logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Tensor:
        return torch.ops.zoo.soft_clamp(self.linear(features), 2.0)


def custom_data(split: str):
    return features(split, 4)

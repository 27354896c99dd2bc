"""The nets of benchmarks/inference.py, and data of their shapes. Plain PyTorch."""

import torch
from reference import ReferenceNet
from reference import build_dataset as images
from torch import Tensor, nn
from torch.utils.data import TensorDataset

LENGTH, WIDTH = 32, 64


class SmallCnn(nn.Module):
    """Images [batch, 3, 28, 28] float32 → logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classify = nn.Linear(32 * 7 * 7, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image).flatten(1))


class SmallTransformer(nn.Module):
    """Tokens [batch, 32, 64] float32 → logits [batch, 10]: two encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2)
        self.classify = nn.Linear(WIDTH, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.encode(tokens).mean(1))


class LargeTransformer(nn.Module):
    """Tokens [batch, 16, 768] float32 → logits [batch, 10]: fourteen encoder layers, 99 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(768, 12, 4 * 768, dropout=0.0, batch_first=True, activation="gelu")
        self.encode = nn.TransformerEncoder(layer, 14)
        self.classify = nn.Linear(768, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.encode(tokens).mean(1))


def build_model(net: str) -> nn.Module:
    nets = {"reference": ReferenceNet, "cnn": SmallCnn, "transformer": SmallTransformer, "large": LargeTransformer}
    return nets[net]()


def build_dataset(split: str, net: str) -> TensorDataset:
    """Noise with a pattern for each of ten classes, 256 to train on and 128 held out; of the large one noise, 32 and
    128."""
    if net == "large":
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        size = 32 if split == "train" else 128
        tokens = torch.randn(size, LENGTH // 2, 768, generator=generator)
        return TensorDataset(tokens, torch.randint(10, (size,), generator=generator))
    if net != "transformer":
        return images(split, samples=256)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, LENGTH, WIDTH, generator=generator)
    generator.manual_seed(1 if split == "train" else 2)
    labels = torch.randint(10, (256 if split == "train" else 128,), generator=generator)
    return TensorDataset(torch.randn(len(labels), LENGTH, WIDTH, generator=generator) + 0.3 * patterns[labels], labels)

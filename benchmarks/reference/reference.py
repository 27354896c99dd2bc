"""The reference convolutional net of the benchmarks, and data of its shape. Plain PyTorch."""

import itertools
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class ReferenceNet(nn.Module):
    """Images [batch, 3, 28, 28] float32 → logits [batch, 10]; 51.5 million parameters, most of them in one layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
                for before, after in itertools.pairwise(widths)
            )
        )
        self.classify = nn.Sequential(nn.Linear(64 * 28 * 28, 1024), nn.Linear(1024, 10))

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image).flatten(1))


def build_model(marks: str = "", net: str = "reference") -> nn.Module:
    """net: `reference`, or `layer` for one linear layer, so that what is not the net's work shows.

    marks: where each rank notes when its training passes begin, as [unix seconds, CPU seconds of the process].
    """
    model = ReferenceNet() if net == "reference" else nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))
    if marks:
        _note_passes(model, Path(marks))
    return model


def _note_passes(model: nn.Module, path: Path) -> None:
    passes: list[list[float]] = []

    def note(module: nn.Module, inputs: object) -> None:
        if module.training:
            passes.append([time.time(), time.process_time()])
        if len(passes) % 50 in (0, 2, 12):
            path.with_name(f"{path.name}-{os.environ['RANK']}").write_text(json.dumps(passes))

    model.register_forward_pre_hook(note)


def build_dataset(split: str, samples: int) -> TensorDataset:
    """Noise with a pattern for each of ten classes; 128 samples are held out."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 28, 28, generator=generator)
    count = samples if split == "train" else 128
    generator.manual_seed(1 if split == "train" else 2)
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 3, 28, 28, generator=generator) + 0.3 * patterns[labels], labels)

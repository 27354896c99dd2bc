"""Which way does a whistle go? A quarter of a second at 8 kHz: rising, falling, level or wavering, made on the spot."""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

RATE, LENGTH = 8000, 2000
FRAME, HOP, BANDS = 256, 128, 32
LARGEST = 32767


class Whistles(nn.Module):
    """sound [batch, 2000] float32 in -1..1 → logits [batch, 4]. Its spectrogram is part of it: a server needs none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(FRAME))
        self.register_buffer("bands", bands())
        self.see = nn.Sequential(
            nn.BatchNorm2d(1),
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 4)),
        )  # fmt: skip
        self.classify = nn.Linear(16 * width, 4)

    def forward(self, sound: Tensor) -> Tensor:
        spectrum = torch.stft(sound, FRAME, HOP, window=self.window, return_complex=True).abs().square()
        loudness = (self.bands @ spectrum).add(1).log()
        return self.classify(self.see(loudness.unsqueeze(1)).flatten(1))


class Recorded(nn.Module):
    """What is served: pcm [batch, 2000] int16, as a recorder gives it → the chance of each way, [batch, 4]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pcm: Tensor) -> dict[str, Tensor]:
        return {"chance": self.model(pcm.float() / LARGEST).softmax(1)}


def bands() -> Tensor:
    """Weights of BANDS triangles, evenly spaced in mel from 0 to half of RATE: [BANDS, FRAME / 2 + 1]."""
    mel = torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    places = torch.linspace(0, RATE / 2, FRAME // 2 + 1)
    up = (places - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - places) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(up, down).clamp_min(0)


def build_model(width: int) -> nn.Module:
    return Whistles(width)


def build_dataset(split: str) -> TensorDataset:
    pcm, ways = recordings(split)
    return TensorDataset(pcm.float() / LARGEST, ways)


def build_raw(split: str) -> TensorDataset:
    return TensorDataset(*recordings(split))


def recordings(split: str) -> tuple[Tensor, Tensor]:
    """pcm [samples, 2000] int16 and ways [samples] int64: whistles at any pitch, loudness and moment, in noise."""
    count = 1600 if split == "train" else 400
    draw = torch.Generator().manual_seed(len(split))
    ways = torch.arange(count) % 4
    time = torch.linspace(-1, 1, LENGTH)
    start = torch.empty(count, 1).uniform_(900, 2200, generator=draw)
    slope = torch.empty(count, 1).uniform_(150, 600, generator=draw) * torch.tensor([1.0, -1.0, 0.0, 0.0])[ways, None]
    waver = torch.empty(count, 1).uniform_(60, 250, generator=draw) * (ways == 3)[:, None]
    turns = torch.empty(count, 1).uniform_(6, 14, generator=draw)
    pitch = start + slope * time + waver * torch.sin(turns * time)
    sound = torch.sin(2 * math.pi * pitch.cumsum(1) / RATE)
    sound *= torch.empty(count, 1).uniform_(0.1, 0.7, generator=draw)
    sound += 0.05 * torch.randn(count, LENGTH, generator=draw)
    return (sound.clamp(-1, 1) * LARGEST).to(torch.int16), ways

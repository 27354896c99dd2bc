"""A transformer as large as BERT-base, and sequences of tokens to train it on. Plain PyTorch."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TOKENS, LENGTH, WIDTH, LAYERS, CLASSES = 1000, 128, 768, 12, 8


class Encoder(nn.Module):
    """Tokens [batch, 128] int64 → logits [batch, 8]; 86 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.encode = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.encode(self.embed(tokens) + self.place).mean(1))


def build_model() -> nn.Module:
    return Encoder()


def build_dataset(split: str, samples: int) -> TensorDataset:
    """Of each class a tenth of the tokens is from its own eighth of the vocabulary; 256 samples are held out."""
    count = samples if split == "train" else 256
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=generator)
    share = TOKENS // CLASSES
    own = labels[:, None] * share + torch.randint(share, (count, LENGTH), generator=generator)
    return TensorDataset(torch.where(torch.rand(count, LENGTH, generator=generator) < 0.1, own, tokens), labels)

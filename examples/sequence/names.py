"""Which language is a name in? 5,600 names of countries, languages, currencies and scripts, from CLDR inside babel."""

import torch
from babel import Locale
from torch import Tensor, nn
from torch.utils.data import TensorDataset

LANGUAGES = ("de", "es", "fi", "fr", "pl", "tr")
TABLES = ("territories", "languages", "currencies", "scripts")
LENGTH = 32


class NameReader(nn.Module):
    """A small transformer: tokens [batch, length] int64, UTF-8 with 0 after a name's end → logits [batch, 6]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classify = nn.Linear(width, len(LANGUAGES))

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens.eq(0)
        states = self.letter(tokens) + self.place.weight[: tokens.shape[1]]
        states = self.encode(states, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(2).to(states.dtype)
        return self.classify((states * kept).sum(1) / kept.sum(1))


def build_model(width: int, layers: int) -> nn.Module:
    return NameReader(width, layers)


def encode(name: str) -> list[int]:
    """What a client sends: UTF-8, cut at 32 bytes and padded with zeros."""
    return list(name.encode()[:LENGTH].ljust(LENGTH, b"\0"))


def build_dataset(split: str) -> TensorDataset:
    """Names that only one of the languages has. What one of five names means is held out, in all languages."""
    found: dict[str, set[tuple[int, int]]] = {}
    for language, code in enumerate(LANGUAGES):
        for table in TABLES:
            for meaning, name in getattr(Locale.parse(code), table).items():
                group = sum(meaning.encode()) % 5
                found.setdefault(name.lower(), set()).add((language, group))
    chosen = [
        (encode(name), language)
        for name, meanings in sorted(found.items())
        if len(meanings) == 1
        for language, group in meanings
        if (group == 0) == (split == "validation")
    ]
    return TensorDataset(torch.tensor([tokens for tokens, _ in chosen]), torch.tensor([label for _, label in chosen]))

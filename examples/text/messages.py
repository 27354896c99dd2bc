"""Messages to a shop: 600 made-up ones, sorted into four piles, with a tokenizer of their own. Plain PyTorch."""

import csv
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TABLE = Path(__file__).with_name("messages.csv")
LABELS = ("account", "billing", "delivery", "returns")
LENGTH = 40
"""Tokens of a message; longer ones are cut, shorter ones end with PAD."""
PAD, UNKNOWN = 0, 1


class Tokenizer:
    """Byte pair encoding: words in pieces, of which those that stand beside each other most often become one."""

    def __init__(self, letters: list[str], merges: list[tuple[str, str]]) -> None:
        self.letters, self.merges = letters, merges
        self.pieces = {piece: code for code, piece in enumerate([*letters, *(a + b for a, b in merges)], UNKNOWN + 1)}
        self.rank = {pair: place for place, pair in enumerate(merges)}

    @classmethod
    def trained(cls, texts: list[str], merges: int) -> "Tokenizer":
        words = Counter(word for text in texts for word in words_of(text))
        letters, found = sorted({letter for word in words for letter in word}), []
        split = {word: list(word) for word in words}
        for _ in range(merges):
            pairs = Counter()
            for word, times in words.items():
                for pair in pairwise(split[word]):
                    pairs[pair] += times
            if not pairs:
                break
            # Of pairs that are as frequent, always the same.
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            found.append(best)
            split = {word: joined(pieces, best) for word, pieces in split.items()}
        return cls(letters, found)

    def encode(self, text: str) -> list[int]:
        codes: list[int] = []
        for word in words_of(text):
            pieces = list(word)
            while known := [pair for pair in pairwise(pieces) if pair in self.rank]:
                pieces = joined(pieces, min(known, key=self.rank.__getitem__))
            codes += [self.pieces.get(piece, UNKNOWN) for piece in pieces]
        return (codes + LENGTH * [PAD])[:LENGTH]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"letters": self.letters, "merges": self.merges}))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        saved = json.loads(path.read_text())
        return cls(saved["letters"], [(first, second) for first, second in saved["merges"]])


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]", text.lower())


def joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each such pair as one."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


class Sorter(nn.Module):
    """tokens int64 [batch, 40] → logits [batch, 4], in the order of LABELS."""

    def __init__(self, pieces: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(pieces, width, padding_idx=PAD)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, len(LABELS)))

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens != PAD).unsqueeze(2)
        mean = (self.embed(tokens) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.layers(mean)


def messages(split: str) -> list[tuple[int, str]]:
    """450 messages to train on, or the 150 that are held out: every fourth."""
    with TABLE.open(newline="") as file:
        table = list(csv.DictReader(file))
    chosen = [row for number, row in enumerate(table) if (number % 4 == 0) == (split == "validation")]
    return [(LABELS.index(row["label"]), row["text"]) for row in chosen]


def train_tokenizer() -> Tokenizer:
    return Tokenizer.trained([text for _, text in messages("train")], merges=200)


def encoded(split: str, tokenizer: Tokenizer) -> TensorDataset:
    table = messages(split)
    tokens = torch.tensor([tokenizer.encode(text) for _, text in table])
    return TensorDataset(tokens, torch.tensor([label for label, _ in table]))


def build_model(width: int) -> nn.Module:
    return Sorter(UNKNOWN + 1 + len(train_tokenizer().pieces), width)


def build_dataset(split: str) -> TensorDataset:
    return encoded(split, train_tokenizer())


def write_tokenizer(folder: Path) -> None:
    """What a server needs to make tokens of a text, as this model has learnt them."""
    train_tokenizer().save(folder / "tokenizer.json")


def prepared(split: str, files: Path) -> TensorDataset:
    """The same samples as another release reads them: files is the folder that it ships."""
    return encoded(split, Tokenizer.load(files / "tokenizer.json"))

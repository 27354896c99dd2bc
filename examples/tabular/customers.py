"""Customers who leave: 1,200 made-up ones, with two columns of categories and three of numbers. Plain PyTorch."""

import csv
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import StackDataset

TABLE = Path(__file__).with_name("customers.csv")
CATEGORIES = ("plan", "country")
NUMBERS = ("months", "tickets", "fee")


class Churn(nn.Module):
    """codes int64 [batch, 2], numbers float32 [batch, 3] in their own units → logits [batch, 2]: stays, leaves."""

    def __init__(self, sizes: list[int], width: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        # Learns mean and spread of each column, so that what is shipped takes raw numbers.
        self.standardise = nn.BatchNorm1d(len(NUMBERS), affine=False, momentum=0.05)
        self.layers = nn.Sequential(nn.Linear(4 * len(sizes) + len(NUMBERS), width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        columns = [embed(codes[:, column]) for column, embed in enumerate(self.embed)]
        return self.layers(torch.cat([*columns, self.standardise(numbers)], 1))


def rows(split: str) -> list[dict[str, str]]:
    """900 customers to train on, or the 300 that are held out: every fourth."""
    with TABLE.open(newline="") as file:
        table = list(csv.DictReader(file))
    return [row for number, row in enumerate(table) if (number % 4 == 0) == (split == "validation")]


def fit() -> dict[str, list[str]]:
    """The categories of each column that the training data has, in the order of their codes."""
    return {column: sorted({row[column] for row in rows("train")}) for column in CATEGORIES}


def encoded(split: str, known: dict[str, list[str]]) -> StackDataset:
    """Samples ((codes, numbers), left). A category that is not known has the code 0."""
    table = rows(split)
    codes = [
        [known[column].index(row[column]) + 1 if row[column] in known[column] else 0 for column in CATEGORIES]
        for row in table
    ]
    numbers = [[float(row[column]) for column in NUMBERS] for row in table]
    left = [int(row["left"]) for row in table]
    return StackDataset(StackDataset(torch.tensor(codes), torch.tensor(numbers)), torch.tensor(left))


def build_model(width: int) -> nn.Module:
    return Churn([len(known) + 1 for known in fit().values()], width)


def build_dataset(split: str) -> StackDataset:
    return encoded(split, fit())


def write_categories(folder: Path) -> None:
    """What a server needs to make codes of categories, as this model has learnt them."""
    (folder / "categories.json").write_text(json.dumps(fit(), indent=2))


def prepared(split: str, files: Path) -> StackDataset:
    """The same samples with the codes that another release has learnt: files is the folder that it ships."""
    return encoded(split, json.loads((files / "categories.json").read_text()))

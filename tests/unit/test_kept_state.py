"""Models that change themselves when they are asked: what formats lose or count on with is refused by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchworker.contract import ExportRequest, Project, Reference
from torchworker.parity.reference import read_probes, write_reference
from torchworker.process.failure import UserError
from torchworker.project.independence import require_independent
from torchworker.project.shippable import require_shippable

HERE = Path(__file__)
NOTHING = Reference(target="a:b", where="model.factory")
PROJECT = Project(name="plain", folder=str(HERE.parent), model=NOTHING, data=NOTHING, loss="mse_loss", metrics=[])
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """A buffer of one element that every call adds to."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=persistent)
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class Assigning(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + 0


class Slowly(Counting):
    """What it changes is smaller than any tolerance."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls.copy_(0.99999999 * self.calls + 1e-8 * x.mean())
        return x + 0


class Clipping(nn.Module):
    """Keeps its weight in bounds, also when it is only asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(0.5)
        return self.layer(x)


class Words(nn.Module):
    def __init__(self, kind: type[nn.Embedding | nn.EmbeddingBag], max_norm: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = kind(40, 8, max_norm=max_norm)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.embed(x)
        return found.flatten(1)


class Shortened(Words):
    """What the refusal of `max_norm` advises."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, torch.renorm(self.embed.weight, 2, 0, 1.0)).flatten(1)


class FilledOnce(nn.Module):
    """Makes a table that is saved on its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4))
        self.table: Tensor
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.table.copy_(torch.arange(4.0) + 1)
            self.ready = True
        return x * self.table


class Angles(nn.Module):
    """A table of angles that grows with the longest input, as rotary embeddings have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cosines", torch.zeros(1), persistent=False)
        self.cosines: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if len(self.cosines) < x.shape[1]:
            self.cosines = torch.arange(float(x.shape[1])).cos()
        return x * self.cosines[: x.shape[1]]


class LastSeen(nn.Module):
    """Gives the same answer to the same question twice, and another one after another question."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(1), persistent=False)
        self.largest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if len(x):
            self.largest = torch.maximum(self.largest, x.abs().max())
        return x / self.largest


class Workspace(nn.Module):
    """Writes each answer into the same memory, and returns that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("answer", torch.zeros(64, 4), persistent=False)
        self.answer: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.answer[: len(x)].copy_(x * 2)


class Recurrent(nn.Module):
    """Keeps its state in an attribute, and returns that."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.state[: len(x)].mul_(0.5).add_(x)


class Graph(nn.Module):
    """With a sparse table, which has no memory to point at, and dropout that is left on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.eye(4).to_sparse())
        self.edges: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.sparse.mm(self.edges, x.T).T, 0.5)


def refusal(model: nn.Module, inputs: Tensor = BATCH) -> str:
    """Empty when there is none."""
    try:
        require_shippable(model.eval(), inputs.clone(), PROJECT, ("torchscript", "onnx", "pt2"))
    except UserError as mistake:
        return str(mistake)
    return ""


def line_of(text: str) -> str:
    lines = HERE.read_text().splitlines()
    return f"{HERE.name}:{next(number for number, line in enumerate(lines, 1) if line.strip() == text)}"


IDS = torch.arange(24).reshape(8, 3)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (Counting(), BATCH, ["the buffer 'calls' in eval mode", line_of("self.calls.add_(1)"), "if self.training"]),
        (Assigning(), BATCH, ["the buffer 'calls' in eval mode", line_of("self.calls = self.calls + 1"), "Assigning"]),
        (Slowly(), BATCH, ["the buffer 'calls' in eval mode", "lose it without a word"]),
        (nn.Sequential(Clipping()), BATCH, [
            "the parameter '0.layer.weight' in eval mode", line_of("self.layer.weight.data.mul_(0.5)"), "Clipping",
        ]),
        (Words(nn.Embedding, 1.0), IDS, [
            "the parameter 'embed.weight' in eval mode", line_of("found: Tensor = self.embed(x)"), "max_norm",
            "torch.renorm(weight, 2, 0, 1)",
        ]),
        (Words(nn.Embedding, 1e9), IDS, ["the parameter 'embed.weight' in eval mode", "max_norm"]),
        (Words(nn.EmbeddingBag, 1.0), IDS, ["the parameter 'embed.weight' in eval mode", "max_norm"]),
        (Graph(), BATCH, ["dropout is on there", line_of("return F.dropout(torch.sparse.mm(self.edges, x.T).T, 0.5)")]),
        (Recurrent(), BATCH, ["differs between two calls", "state in forward"]),
        (Counting(persistent=False), BATCH, [
            "differs between two calls", "the buffer 'calls'", line_of("self.calls.add_(1)"), "return it as an output",
        ]),
    ],
)  # fmt: skip
def test_a_model_that_changes_itself_when_it_is_asked_is_refused_by_name_and_line(
    model: nn.Module, inputs: Tensor, expected: list[str]
) -> None:
    said = refusal(model, inputs)
    assert [part for part in ["model.factory: ", *expected] if part not in said] == [], said


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Words(nn.Embedding, None), IDS),
        (Shortened(nn.Embedding, None), IDS),
        (Words(nn.Embedding, 1e9).requires_grad_(False), IDS),
        (FilledOnce(), BATCH),
        (Angles(), BATCH),
        (Workspace(), BATCH),
        (nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), BATCH),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), BATCH),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), BATCH),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), BATCH),
    ],
)
def test_what_is_filled_once_or_only_kept_at_hand_is_no_matter(model: nn.Module, inputs: Tensor) -> None:
    assert refusal(model, inputs) == ""


def test_a_model_that_answers_otherwise_after_other_questions_is_refused_before_a_format_is_made(
    tmp_path: Path,
) -> None:
    request = ExportRequest(
        project=PROJECT, folder=str(tmp_path), weights="", formats=[], batch=4, seed=0, validation_limit=8
    )
    with pytest.raises(UserError, match="another one after other inputs were asked: the model remembers them"):
        write_reference(request, LastSeen().eval(), {"x": BATCH[:4]}, TensorDataset(BATCH, BATCH))


def test_an_answer_that_the_next_one_is_written_over_is_taken_as_it_was_given(tmp_path: Path) -> None:
    model = Workspace().eval()
    with torch.no_grad():
        outputs = require_shippable(model, BATCH, PROJECT, ("onnx",))
    assert "do not depend on the other samples" in require_independent(model, BATCH, PROJECT, outputs)
    request = ExportRequest(
        project=PROJECT, folder=str(tmp_path), weights="", formats=[], batch=4, seed=0, validation_limit=8
    )
    write_reference(request, model, {"x": BATCH[:4]}, TensorDataset(BATCH, BATCH))
    asked = [probe for probe in read_probes(tmp_path) if probe.eager is not None]
    assert len(asked) > 10
    for probe in asked:
        assert torch.equal((probe.eager or {})["output"].nan_to_num(), (probe.inputs["x"] * 2).nan_to_num()), probe.name

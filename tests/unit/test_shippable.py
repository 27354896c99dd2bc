"""What a model has to be like to be shipped, asked before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchworker.contract import Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.shippable import require_shippable

HERE = Path(__file__)
NOTHING = Reference(target="a:b", where="model.factory")
PROJECT = Project(
    name="plain", folder=str(HERE.parent), model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=["accuracy"]
)
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A net of two layers that gives more than its logits, or gives them otherwise."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)
        if way == "half weights":
            self.coarse = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> object:
        hidden = self.first(x)
        logits = self.second(hidden)
        if self.way == "scalar":
            return {"logits": logits, "temperature": logits.mean().exp()}
        if self.way == "scalar first":
            return {"temperature": logits.mean().exp(), "logits": logits}
        if self.way == "squeezed":
            return {"logits": logits, "score": logits[:, 0].squeeze()}
        if self.way == "table":
            return {"logits": logits, "table": self.second.weight * 2}
        if self.way == "as long as the batch":
            return logits, torch.arange(8.0)
        if self.way == "state":
            return {"logits": logits, "state": hidden.expand(2, -1, -1)}
        if self.way == "found":
            return {"logits": logits, "found": (logits > 0).nonzero()}
        if self.way == "sparse":
            return {"logits": logits, "found": logits.to_sparse()}
        if self.way == "complex":
            return {"logits": logits, "spectrum": torch.fft.rfft(logits)}
        if self.way == "half":
            return {"logits": logits, "hidden": hidden.bfloat16()}
        if self.way == "half weights":
            return self.coarse(x.bfloat16()).float()
        if self.way == "named":
            return {"logits": logits, "x": x * 2}
        if self.way == "functional dropout":
            return self.second(F.dropout(hidden, 0.3))
        if self.way == "attention":
            heads = hidden[:, None]
            return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2)
        if self.way == "module left on":
            self.drop.train()
            return self.second(self.drop(hidden))
        if self.way == "noise":
            return logits + torch.randn(3)
        if self.way == "noise in training":
            return logits + torch.randn(3) if self.training else logits
        if self.way == "noise that nobody sees":
            torch.randn(3)
            return logits
        if self.way == "in place":
            return self.first(x.mul_(2))
        if self.way == "counts":
            self.calls.add_(1)
            return logits
        return logits


def refusal(way: str, formats: tuple[str, ...] = ("torchscript", "onnx", "pt2")) -> str:
    """Empty when there is none."""
    torch.manual_seed(0)
    try:
        # Inside another model, but where the names of inputs count.
        model = Net(way) if way == "named" else nn.Sequential(Net(way))
        require_shippable(model.eval(), BATCH.clone(), PROJECT, formats)
    except UserError as mistake:
        return str(mistake)
    return ""


def line_of(text: str) -> str:
    """`test_shippable.py:12` of the line with this text."""
    lines = HERE.read_text().splitlines()
    return f"{HERE.name}:{next(number for number, line in enumerate(lines, 1) if line.strip() == text)}"


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("scalar first", ["output 'temperature' of forward is one number of the whole batch", "return it after"]),
        ("squeezed", ["output 'score' of forward is float32 [] for a batch of 1; expected the batch as the first"]),
        ("table", ["output 'table' of forward is float32 [3, 6] for a batch of 8", "batch as the first dimension"]),
        ("as long as the batch", ["output 'output_1' of forward is float32 [8] for a batch of 1"]),
        ("state", ["output 'state' of forward is float32 [2, 8, 6] for a batch of 8", "transpose"]),
        ("found", ["output 'found' of forward is int64 ["]),
        ("complex", ["output 'spectrum' of forward is complex64 [8, 2]", "torch.view_as_real"]),
        ("half", ["output 'hidden' of forward is bfloat16 [8, 6]", "(.float())", "or leave onnx out"]),
        (
            "half weights",
            ["the weight of 0.coarse (Linear) is bfloat16", "has no MatMul, Gemm or Conv for it", ".float()"],
        ),
        ("named", ["output 'x' of forward has the name of an input", "rename it", "or leave onnx out"]),
        ("in place", ["changes its input 'input' in place", "clone it first"]),
        ("counts", ["changes the buffer '0.calls' in eval mode"]),
        ("sparse", ["output 'found' of forward is a tensor of layout sparse_coo", "return its to_dense()"]),
    ],
)
def test_an_output_that_cannot_be_shipped_is_refused_by_its_name(way: str, expected: list[str]) -> None:
    said = refusal(way)
    assert [part for part in ["model.factory: ", *expected] if part not in said] == [], said


@pytest.mark.parametrize(
    ("way", "line", "expected"),
    [
        (
            "functional dropout",
            "return self.second(F.dropout(hidden, 0.3))",
            ["module 0 (Net)", "training=self.training"],
        ),
        (
            "attention",
            "return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2)",
            ["dropout is on", "dropout_p=0.0 unless self.training"],
        ),
        ("module left on", "return self.second(self.drop(hidden))", ["0.drop is in training mode although"]),
        ("noise", "return logits + torch.randn(3)", ["draws random numbers", "if self.training"]),
    ],
)
def test_what_makes_each_answer_another_is_named_with_its_module_and_line(
    way: str, line: str, expected: list[str]
) -> None:
    said = refusal(way)
    assert "differs between two calls on the same inputs in eval mode" in said
    assert [part for part in [line_of(line), *expected] if part not in said] == [], said


@pytest.mark.parametrize("way", ["", "noise in training", "noise that nobody sees", "scalar"])
def test_nothing_is_said_of_a_model_that_gives_the_same_each_time(way: str) -> None:
    assert refusal(way) == ""


@pytest.mark.parametrize("way", ["half", "half weights", "named"])
def test_what_onnx_alone_cannot_hold_is_no_matter_without_it(way: str) -> None:
    assert refusal(way, ("torchscript", "pt2")) == ""


def test_usual_layers_have_nothing_to_refuse() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 2).eval()
    picture = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Flatten()).eval()
    assert require_shippable(encoder, torch.randn(3, 5, 4), PROJECT, ["onnx"]).shape == (3, 5, 4)
    assert require_shippable(picture, torch.randn(1, 1, 8, 8), PROJECT, ["onnx"]).shape == (1, 144)


def test_every_output_that_cannot_be_shipped_is_told_at_once() -> None:
    class Both(nn.Linear):
        def forward(self, input: Tensor) -> object:
            return super().forward(input), self.bias, self.weight

    with pytest.raises(UserError) as caught:
        require_shippable(Both(4, 3).eval(), BATCH, PROJECT, ())
    assert [line.split("'")[1] for line in str(caught.value).splitlines()] == ["output_1", "output_2"]

"""A model in float64 whose weights are not copied gives what a copy in float64 gives, and leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.support.parity import CODE, NOTHING
from torchworker.contract import Project
from torchworker.project import weights
from torchworker.project.answers import Answers, doubled
from torchworker.project.streamed import Streamed, WrittenError, in_double, is_streamed

PROJECT = Project(name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[])


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE_BYTES", 0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Asks(nn.Module):
    """Goes by a weight's dtype, and uses weights outside the module that has them, in a list and as views."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 4)
        self.listed = [self.score.weight]
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.score.weight
        return self.score(x.to(weight.dtype)) * self.scale + weight[0].sum() + weight.T.mean() + self.listed[0].sum()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.embed(tokens))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)


IMAGES = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (encoder(), torch.randn(3, 5, 8)),
        (IMAGES, torch.randn(2, 3, 8, 8)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)),
        (Asks(), torch.randn(2, 4)),
        (Tied(), torch.arange(9)[None]),
        (nn.Linear(4, 3).to(torch.bfloat16), torch.randn(2, 4).to(torch.bfloat16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_it_gives_what_a_copy_in_float64_gives_and_holds_the_models_own_weights(
    model: nn.Module, inputs: Tensor
) -> None:
    model.eval()
    given = doubled({"x": inputs})["x"]
    twin = in_double(model)
    with torch.no_grad():
        expected, got = copy.deepcopy(model).double()(given), twin(given)
    for one, two in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        assert two.dtype == torch.float64 and torch.allclose(one, two, rtol=1e-13, atol=1e-15)
    own = dict(model.named_parameters())
    for name, weight in twin.named_parameters():
        assert isinstance(weight, Streamed) and isinstance(weight, nn.Parameter) and weight.held is own[name]


class Counts(nn.Module):
    """Counts its calls, in whole numbers or in a number that is turned into float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.score = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=dtype))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        return self.score(x)


def test_what_forward_writes_or_keeps_in_float64_stays_out_of_the_model() -> None:
    model = Counts(torch.int64)
    with torch.no_grad():
        in_double(model)(torch.zeros(1, 3, dtype=torch.float64))
    assert int(model.calls) == 0 and model.seen == []
    with pytest.raises(WrittenError, match=r"aten\.add_\.Tensor writes into a weight or buffer"), torch.no_grad():
        in_double(Counts(torch.float32))(torch.zeros(1, 3, dtype=torch.float64))


def test_a_model_that_writes_into_a_weight_is_copied_and_held_to_no_weaker_rule() -> None:
    model = Counts(torch.float32).eval()
    answers = Answers(model.eval(), PROJECT)
    x = torch.randn(2, 3)
    with torch.no_grad():
        exact = answers.exact({"x": x})["output"]
        assert torch.equal(exact, copy.deepcopy(model).double()(x.double()))
    assert not answers.fixed_precision and answers.double is not None and not is_streamed(answers.double)


def test_a_small_model_is_copied_and_one_that_reads_its_weights_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_streamed(in_double(nn.LSTM(3, 2)))
    monkeypatch.setattr(weights, "LARGE_BYTES", 4 * (3 * 2 + 2))
    assert not is_streamed(in_double(nn.Linear(3, 2)))
    monkeypatch.setattr(weights, "LARGE_BYTES", 4 * (3 * 2 + 2) - 1)
    assert is_streamed(in_double(nn.Linear(3, 2)))

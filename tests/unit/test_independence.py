"""Does the answer to a sample depend on the others of its batch? Asked of models that do, and of those that do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shipreader.mlserver import can_batch, rows_together
from torchworker.contract import Project, Reference, TensorSpec
from torchworker.process.failure import UserError
from torchworker.project.independence import NOT_ASKED, require_independent
from torchworker.project.signature import of_one_sample, samples_of_a_call

HERE = Path(__file__)
NOTHING = Reference(target="plain:nothing", where="model.factory")
PROJECT = Project(name="plain", folder=str(HERE.parent), model=NOTHING, data=NOTHING, loss="mse_loss", metrics=[])
INDEPENDENT = "Answers do not depend on the other samples of a batch: asked of 4 samples alone, of 8 in another order"

Compute = Callable[[Tensor], Any]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def asked(model: nn.Module, inputs: Any, project: Project = PROJECT) -> str:
    torch.set_num_threads(1)
    return require_independent(model.eval(), inputs, project)


def refusal(model: nn.Module, inputs: Any) -> str:
    with pytest.raises(UserError) as refused:
        asked(model, inputs)
    return str(refused.value)


def line(source: str) -> str:
    """`test_independence.py:12: source`, of a line in this file."""
    lines = [number for number, text in enumerate(HERE.read_text().splitlines(), 1) if text.strip() == source]
    return f"{HERE.name}:{lines[0]}: {source}"


class Layers(nn.Module):
    """A layer of each side and something of one's own between them: [B, …, 6] → [B, …, 3]."""

    def __init__(self, between: Compute) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.between, self.after = nn.Linear(6, 8), between, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.before(x)))


class Sequences(nn.Module):
    """A layer of torch's on sequences: [B, T, 6] → [B, 3]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.last((seen[0] if isinstance(seen, tuple) else seen)[:, -1])


# --- what looks across the batch, each as a function of [B, 8]


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def slightly_centred(x: Tensor) -> Tensor:
    return x - 1e-3 * x.mean(0)


def ranked(x: Tensor) -> Tensor:
    return x.argsort(0).argsort(0).float() / len(x)


def scaled_by_the_largest(x: Tensor) -> Tensor:
    return x / x.abs().max()


def placed(x: Tensor) -> Tensor:
    place = torch.arange(len(x), device=x.device).to(x.dtype)
    return x + place[:, None] / 10


def beside_the_one_before(x: Tensor) -> Tensor:
    return x + x.roll(1, 0)


def compared(x: Tensor) -> Tensor:
    last = x[torch.arange(len(x)), x.argmax(1) * 0]
    return (x @ x.T).softmax(1)[:, :1] + last[:, None] + x


@pytest.mark.parametrize(
    ("between", "call", "source"),
    [
        (compared, "matmul", "return (x @ x.T).softmax(1)[:, :1] + last[:, None] + x"),
        (centred, "mean", "return x - x.mean(0)"),
        (slightly_centred, "mean", "return x - 1e-3 * x.mean(0)"),
        (ranked, "argsort", "return x.argsort(0).argsort(0).float() / len(x)"),
        (scaled_by_the_largest, "max", "return x / x.abs().max()"),
        (placed, "arange", "place = torch.arange(len(x), device=x.device).to(x.dtype)"),
        (beside_the_one_before, "roll", "return x + x.roll(1, 0)"),
    ],
)
def test_what_looks_across_the_batch_in_your_own_code_is_named_by_its_line(
    between: Compute, call: str, source: str
) -> None:
    told = refusal(Layers(between), drawn(64, 6))
    assert f"It comes from the model (Layers), in its call of {call}, {line(source)}" in told
    assert re.search(r"output \[\d\] of validation sample \d+ is \S+ in a batch of 64 and \S+ alone", told)
    assert "parity: {coupled: allowed}" in told


def test_an_output_that_compares_each_sample_with_each_is_named_not_the_places_of_its_rows() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.one(x)[torch.arange(len(x)), :]
            return torch.matmul(rows, x[:, :4].T)

    told = refusal(Pairs(), drawn(64, 6))
    assert f"in its call of matmul, {line('return torch.matmul(rows, x[:, :4].T)')}" in told


def moving_norm() -> nn.Module:
    class Stuck(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    return Stuck(8)


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.LSTM(6, 6), "layer (LSTM(batch_first=False))"),
        (nn.LSTM(6, 3, num_layers=2, bidirectional=True), "layer (LSTM(batch_first=False))"),
        (nn.GRU(6, 6), "layer (GRU(batch_first=False))"),
        (nn.RNN(6, 6), "layer (RNN(batch_first=False))"),
        (nn.MultiheadAttention(6, 2), "layer (MultiheadAttention(batch_first=False))"),
        (encoder(batch_first=False), "layer.layers.0.self_attn (MultiheadAttention(batch_first=False))"),
    ],
)
def test_a_forgotten_batch_first_is_named_with_what_to_do(layer: nn.Module, named: str) -> None:
    told = refusal(Sequences(layer), drawn(16, 5, 6))
    assert f"It comes from {named}, {HERE.name}:" in told
    assert "here dimension 0 is the batch: batch_first=True" in told


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 6, batch_first=True),
        nn.GRU(6, 6, batch_first=True),
        nn.MultiheadAttention(6, 2, batch_first=True),
        encoder(batch_first=True),
    ],
)
def test_the_same_layers_with_batch_first_are_independent(layer: nn.Module) -> None:
    assert asked(Sequences(layer), drawn(16, 5, 6)) == f"{INDEPENDENT} and of a batch of 16"


@pytest.mark.parametrize(
    ("norm", "named", "advice"),
    [
        (nn.BatchNorm1d(8, track_running_stats=False), "1 (BatchNorm1d(track_running_stats=False))", "GroupNorm"),
        (moving_norm(), "1 (Stuck(training=True))", "let eval() reach it"),
    ],
)
def test_a_batch_norm_by_the_batch_at_hand_is_named(norm: nn.Module, named: str, advice: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
    told = refusal(model, drawn(32, 6))
    # Without running statistics a single row has no variance: torch refuses it.
    assert f"refuses one of them alone in {named}" in told
    assert advice in told
    wide = nn.Sequential(nn.Linear(6, 16), nn.Unflatten(1, (8, 2)), norm, nn.Flatten(), nn.Linear(16, 3))
    told = refusal(wide, drawn(32, 6))
    assert f"It comes from {named.replace('1 (', '2 (', 1)}" in told
    assert advice in told


class Two(nn.Module):
    """Two inputs and several outputs; the second is centred by the batch where it is asked."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.coupled, self.layer = coupled, nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        states = self.layer(left) + self.layer(right)
        other = F.softmax(states, 0 if self.coupled else 1)
        # [layers, B, …], as h of an LSTM; and one number that has no row for a sample.
        return {"logits": states, "share": other, "states": torch.stack([states, 2 * states]), "spread": states.std()}


def test_inputs_by_name_and_several_outputs_are_asked_alike() -> None:
    inputs = {"right": drawn(12, 6), "left": drawn(12, 6) + 1}
    assert asked(Two(coupled=False), inputs).startswith(INDEPENDENT)
    told = refusal(Two(coupled=True), inputs)
    assert "share [" in told
    assert line("other = F.softmax(states, 0 if self.coupled else 1)") in told


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.LocalResponseNorm(2)])
def test_norms_of_one_sample_and_with_running_statistics_are_independent(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 3))
    assert asked(model, drawn(32, 1, 6, 6)).startswith(INDEPENDENT)


class Turned(nn.Module):
    """Correct without batch_first: time goes first and comes back; answers are as long as the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), lengths, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
        return self.last(padded.transpose(0, 1))


def test_answers_as_long_as_the_longest_of_their_batch_are_no_coupling() -> None:
    lengths = torch.tensor([1, 5, 3, 2, 4, 5, 1, 2, 3])
    assert asked(Turned(), (drawn(9, 5, 6), lengths)).startswith(INDEPENDENT)


class Chaotic(nn.Module):
    """Sums in an order that depends on the batch size, as kernels do, and makes much of the rounding."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x.flip(1) if len(x) == 1 else x).cumsum(1)[:, -1:].sigmoid()
        for _ in range(32):
            x = 3.9 * x * (1 - x)
        return x


class Decides(Chaotic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) > 0.5


class Single(Chaotic):
    """In float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize("kind", [Chaotic, Decides, Single])
def test_what_rounding_alone_moves_is_no_coupling(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 300), kind()), drawn(64, 6)
    with torch.no_grad():
        alone, together = torch.cat([model(row[None]) for row in inputs]), model(inputs)
    assert float((alone.double() - together.double())[[0, 21, 42, 63]].abs().max()) > 0.01, "it does look coupled"
    assert asked(model, inputs).startswith(INDEPENDENT)


class Fixed(nn.Module):
    """Runs in float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x - x.mean(0)


class Labels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)).argmax(1)


@pytest.mark.parametrize("last", [Fixed(), Labels()])
def test_a_model_without_float64_or_with_whole_numbers_is_caught_too(last: nn.Module) -> None:
    told = refusal(nn.Sequential(nn.Linear(6, 8), last), drawn(64, 6))
    assert f"It comes from 1 ({type(last).__name__}), in its call of mean" in told


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


def test_randomness_is_not_taken_for_coupling() -> None:
    said = asked(nn.Sequential(nn.Linear(6, 8), Random()), drawn(64, 6))
    assert said == f"{NOT_ASKED}the model gives other answers to the same batch when it is asked again"


def test_one_sample_says_that_it_was_not_asked() -> None:
    assert asked(Layers(centred), drawn(1, 6)) == f"{NOT_ASKED}it takes two samples"
    assert asked(Layers(centred), drawn(2, 6), replace(PROJECT, coupled=True)).startswith("Answers depend on")


def test_a_job_that_allows_it_has_the_fact_and_the_place_on_record() -> None:
    said = asked(Layers(centred), drawn(64, 6), replace(PROJECT, coupled=True))
    assert said.startswith("Answers depend on the other samples of a batch, as the job allows, so gates are measured")
    assert said.endswith(f"It comes from the model (Layers), in its call of mean, {line('return x - x.mean(0)')}")


def test_a_signature_of_one_sample_is_asked_one_by_one_and_never_batched() -> None:
    specs = [TensorSpec(name="x", dtype="float32", shape=["batch", 6])]
    assert samples_of_a_call(specs, 64) == 64
    one = of_one_sample(specs)
    assert [spec.shape for spec in one] == [[1, 6]]
    assert samples_of_a_call(one, 64) == 1
    both = {side: [{"name": "x", "dtype": "float32", "shape": ["batch", 6]}] for side in ("inputs", "outputs")}
    assert can_batch(both)
    assert rows_together(both, 64) == 64
    assert rows_together({**both, "dims": [{"name": "batch", "min": 1, "max": None}]}, 64) == 64
    # More were not proven, whatever is asked for.
    assert rows_together(both, 500) == 64
    assert rows_together(both, 1) == 1
    assert rows_together({**both, "dims": [{"name": "batch", "min": 1, "max": 20}]}, 64) == 20
    # Two requests have no room there, so nothing is put together and nothing was asked.
    for least, most in ((1, 1), (8, 8), (5, 9), (40, None)):
        assert rows_together({**both, "dims": [{"name": "batch", "min": least, "max": most}]}, 64) == 1
    assert rows_together({**both, "dims": [{"name": "batch", "min": 5, "max": 10}]}, 64) == 10
    assert rows_together({**both, "coupled": True}, 64) == 1
    # An auxiliary loss is of a whole request.
    number = {"name": "balance", "dtype": "float32", "shape": []}
    assert rows_together({**both, "outputs": [*both["outputs"], number]}, 64) == 1
    assert rows_together({side: [{"name": "x", "dtype": "float32", "shape": [1, 6]}] for side in both}, 64) == 1


class Branch(nn.Module):
    """One way for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.warm, self.cold = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.warm(x)
        return self.cold(x)


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_branch_that_the_whole_batch_takes_is_named_by_its_line() -> None:
    torch.manual_seed(0)
    assert f"in its call of sum, {line('if x.sum() > 0:')}" in refusal(Branch(), drawn(16, 6))


def test_inside_what_is_scripted_the_module_is_named() -> None:
    scripted = torch.jit.script(Scripted())  # type: ignore[no-untyped-call]
    told = refusal(nn.Sequential(nn.Linear(6, 8), scripted, nn.Linear(8, 3)), drawn(16, 6))
    assert "It comes from 1 (RecursiveScriptModule)" in told

"""What Python decides while a model is traced: harmless or not, by what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests.support.capture_subject import of
from torchworker.contract import DynamicDim
from torchworker.exporters.program import capture
from torchworker.exporters.torchscript import torchscript
from torchworker.process.failure import UserError
from torchworker.runtimes.load import load_with_weights

HERE = str(Path(__file__).parent)


class Decides(nn.Module):
    """Cannot be scripted, so that a trace is all there is; `decide` does what a test asks about."""

    def __init__(self, decide: Callable[[Decides, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, 6]."""
        return self.decide(self, x)


def export(decide: Callable[[Decides, Tensor], Tensor], path: Path, longest: int | None = 9) -> str:
    torch.manual_seed(0)
    dims = [
        DynamicDim(name="batch", min=1, max=20, axes={"x": (0,)}),
        *([DynamicDim(name="length", min=2, max=longest, axes={"x": (1,)})] if longest else []),
    ]
    return torchscript(of(Decides(decide), {"x": torch.randn(4, 5, 6)}, dims, HERE), path / "model.ts").method


def unpacks_a_fixed_axis(model: Decides, x: Tensor) -> Tensor:
    a, b = x.reshape(x.shape[0], x.shape[1], 2, 3).permute(2, 0, 1, 3)
    return model.linear(torch.cat([b, a], -1))


def reads_a_weight(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) * model.scale.tolist()[2] if model.scale.sum() > 2 else model.linear(-x)


def asserts_a_value(model: Decides, x: Tensor) -> Tensor:
    assert x.abs().max() < 1e30
    if x.isnan().any():
        message = "expected numbers"
        raise ValueError(message)
    torch._assert((x.abs() < 1e30).all(), "expected small numbers")
    return model.linear(x)


def asks_for_a_fixed_size(model: Decides, x: Tensor) -> Tensor:
    if x.shape[2] == 6:
        x = x * int(x.shape[2])
    return model.linear(x)


def goes_over_a_fixed_axis(model: Decides, x: Tensor) -> Tensor:
    out = torch.zeros_like(model.linear(x))
    for step in range(x.shape[2]):
        out = out + x[..., step : step + 1] * step
    return model.linear(x) + out + torch.tensor(x.shape[2])


def asks_a_size_that_never_decides(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) if x.shape[1] < 100 else model.linear(-x)


def computes_the_same_on_both_sides(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x.contiguous() if x.shape[0] >= 17 else x)


def sees_values_of_ones_like(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) if torch.ones_like(x).min() > 0 else model.linear(-x)


def asks_for_a_tensor_as_a_tensor(model: Decides, x: Tensor) -> Tensor:
    return model.linear(torch.as_tensor(x))


def asks_for_a_size_behind_a_list_and_a_write(model: Decides, x: Tensor) -> Tensor:
    a, b = torch.cat([x, x], -1).chunk(2, -1)
    chosen = x[x[..., 0] > 0]
    written = torch.zeros(x.shape[1], 6).index_add(0, torch.zeros_like(chosen[:, 0], dtype=torch.long), chosen)
    return model.linear(a + b + 0 * written) if a.shape[2] == written.shape[1] else model.linear(-x)


def gives_one_output_in_a_dict(model: Decides, x: Tensor) -> Any:
    return {"output": model.linear(x)}


@pytest.mark.parametrize(
    "decide",
    [
        asks_for_a_tensor_as_a_tensor,
        asks_for_a_size_behind_a_list_and_a_write,
        gives_one_output_in_a_dict,
        unpacks_a_fixed_axis,
        reads_a_weight,
        asserts_a_value,
        asks_for_a_fixed_size,
        goes_over_a_fixed_axis,
        asks_a_size_that_never_decides,
        sees_values_of_ones_like,
        computes_the_same_on_both_sides,
    ],
)
def test_what_inputs_cannot_turn_is_traced(decide: Callable[[Decides, Tensor], Tensor], tmp_path: Path) -> None:
    assert export(decide, tmp_path) == "torch.jit.trace"


def decides_on_values(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) if x.sum() > 0 else model.linear(-x)


def decides_on_a_value_far_behind(model: Decides, x: Tensor) -> Tensor:
    largest = model.linear(x).softmax(-1).amax((0, 1)).max()
    return model.linear(x) * (2 if float(largest) > 0.9 else 1)


def counts_values(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) * len(x.flatten().nonzero())


def makes_a_constant_of_a_value(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) * torch.tensor(x.sum().item())


def cuts_by_a_value(model: Decides, x: Tensor) -> Tensor:
    kept = x.flatten()[: x.abs().sum().long()]
    return model.linear(x) if len(kept) < 1000 else model.linear(-x)


def selects_by_a_mask(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) * sum(1 for _ in x[x > 0])


def asks_numpy(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) * float(numpy.max(x.numpy()))


def asserts_in_one_branch_and_goes_on_in_the_other(model: Decides, x: Tensor) -> Tensor:
    if x.sum() > 1e6:
        raise ValueError
    elif x.sum() > 0:
        x = -x
    return model.linear(x)


@pytest.mark.parametrize(
    "decide",
    [
        decides_on_values,
        decides_on_a_value_far_behind,
        counts_values,
        makes_a_constant_of_a_value,
        cuts_by_a_value,
        selects_by_a_mask,
        asks_numpy,
        asserts_in_one_branch_and_goes_on_in_the_other,
    ],
)
def test_what_values_of_inputs_can_turn_is_refused_with_the_line(
    decide: Callable[[Decides, Tensor], Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trace: it would bake in a decision made on the example data \(test_dec"):
        export(decide, tmp_path)


def decides_on_the_batch(model: Decides, x: Tensor) -> Tensor:
    return model.linear(-x) if x.shape[0] == 1 else model.linear(x)


def decides_on_a_large_batch(model: Decides, x: Tensor) -> Tensor:
    return model.linear(-x) if x.shape[0] >= 20 else model.linear(x)


def decides_on_a_length(model: Decides, x: Tensor) -> Tensor:
    return model.linear(x) if x.shape[1] < 8 else model.linear(-x)


def goes_over_the_lengths(model: Decides, x: Tensor) -> Tensor:
    return torch.stack([model.linear(step) for step in x.unbind(1)][: int(x.shape[1])], 1)


def unpacks_the_lengths(model: Decides, x: Tensor) -> Tensor:
    return torch.stack([model.linear(step) for step in x.transpose(0, 1)], 1)


@pytest.mark.parametrize(
    "decide",
    [decides_on_the_batch, decides_on_a_large_batch, decides_on_a_length, goes_over_the_lengths, unpacks_the_lengths],
)
def test_what_a_declared_size_turns_is_refused_with_both_sizes(
    decide: Callable[[Decides, Tensor], Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trace: it would bake in a decision made on sizes \(test_dec.*4, 5, 6\].* on"):
        export(decide, tmp_path)


def test_a_length_that_is_not_declared_may_decide(tmp_path: Path) -> None:
    for decide in (decides_on_a_length, goes_over_the_lengths, unpacks_the_lengths):
        assert export(decide, tmp_path, longest=None) == "torch.jit.trace"


def test_tensors_are_as_before_when_a_trace_is_over(tmp_path: Path) -> None:
    before = dict(vars(Tensor))
    with pytest.raises(UserError):
        export(decides_on_values, tmp_path)
    assert dict(vars(Tensor)) == before
    assert torch.tensor.__module__ == "torch"


def test_an_assertion_on_values_is_refused_by_torch_export_with_what_to_do(tmp_path: Path) -> None:
    def checks(model: Decides, x: Tensor) -> Tensor:
        if x.min() < -1e6:
            raise ValueError("expected larger numbers")
        return model.linear(x)

    def checks_outside_of_a_capture(model: Decides, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.min() < -1e6:
            raise ValueError("expected larger numbers")
        return model.linear(x)

    dims = [DynamicDim(name="batch", min=1, max=20, axes={"x": (0,)})]
    with pytest.raises(UserError, match=r"if x.min\(\) < -1e6:\). An assertion on values .*is_exporting\(\)"):
        capture(of(Decides(checks), {"x": torch.randn(4, 5, 6)}, dims, HERE))
    assert capture(of(Decides(checks_outside_of_a_capture), {"x": torch.randn(4, 5, 6)}, dims, HERE)).method


class OfOneSize(nn.Module):
    """Refuses other pictures in Python, as vision models of transformers do; `map` is what no script takes."""

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.mix, self.named = nn.Linear(4, 3), named

    def forward(self, picture: Tensor) -> Any:
        if picture.shape[-1] != 4 or picture.shape[1] != 2:
            raise ValueError(f"a picture of 2 × 4, got {tuple(picture.shape)}")
        (mixed,) = map(self.mix, [picture])
        answer = mixed.mean(1)
        return {"said": answer, "twice": 2 * answer} if self.named else answer


@pytest.mark.parametrize("named", [False, True])
def test_a_trace_that_loses_the_models_look_at_its_inputs_gets_one_of_the_fixed_sizes(
    tmp_path: Path, named: bool
) -> None:
    model = OfOneSize(named).eval().requires_grad_(False)
    dims = [DynamicDim(name="batch", min=1, max=None, axes={"picture": (0,)})]
    subject = replace(
        of(model, {"picture": torch.randn(8, 2, 4)}, dims), outputs=["said", "twice"] if named else ["output"]
    )
    made = torchscript(subject, tmp_path / "model")
    assert made.method == "torch.jit.trace, which looks at fixed sizes"
    loaded = load_with_weights("torchscript", tmp_path / "model", 1)
    if not named:
        assert dict(loaded.weights(())).keys() == model.state_dict().keys()
    for batch in (1, 8, 65):
        picture = torch.randn(batch, 2, 4)
        expected = model(picture)
        for one, two in zip(loaded.call({"picture": picture}), expected.values() if named else [expected], strict=True):
            torch.testing.assert_close(one, two)
    for wrong in (torch.randn(8, 3, 4), torch.randn(8, 2, 5)):
        with pytest.raises(RuntimeError, match="expects split_sizes to sum exactly to"):
            loaded.call({"picture": wrong})

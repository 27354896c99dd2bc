from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchworker.parity import compare


def reference() -> tuple[Tensor, Tensor]:
    """A float32 computation and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    inputs = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    return inputs.float() @ weights.float(), inputs.float().double() @ weights.float().double()


def test_the_same_bits_pass() -> None:
    eager, exact = reference()
    assert compare(eager.clone(), eager, exact).passed


def test_another_order_of_summation_passes() -> None:
    eager, exact = reference()
    other = eager + (exact.float() - eager) * 2
    assert compare(other, eager, exact).passed


def test_an_error_far_below_the_usual_tolerances_is_caught() -> None:
    eager, exact = reference()
    other = eager + 3e-5
    torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-4)  # what a common rule lets through
    assert not compare(other, eager, exact).passed


def test_one_wrong_element_is_caught() -> None:
    eager, exact = reference()
    other = eager.clone()
    other[3, 3] += 1e-3
    assert not compare(other, eager, exact).passed


def test_an_ill_conditioned_model_may_differ_as_much_as_eager_itself_does() -> None:
    eager, exact = reference()
    noisy = eager + 1e-3 * torch.sign(eager)
    assert compare(noisy - 2e-3 * torch.sign(eager), noisy, exact).passed


def test_without_float64_the_eager_output_is_the_reference() -> None:
    eager, _ = reference()
    assert compare(eager.clone(), eager, None).passed
    assert not compare(eager * 1.001, eager, None).passed


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        (torch.zeros(2, 3), "shape"),
        (torch.zeros(2, 2, dtype=torch.float64), "dtype"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), "NaN"),
        (torch.tensor([[0.0, float("inf")], [0.0, 0.0]]), "NaN or infinity"),
    ],
)
def test_shape_dtype_and_non_finite_values_must_agree(got: Tensor, reason: str) -> None:
    outcome = compare(got, torch.zeros(2, 2), None)
    assert not outcome.passed and reason in outcome.reason


def test_integers_must_be_equal() -> None:
    eager = torch.arange(6)
    assert compare(eager.clone(), eager, None).passed
    assert not compare(eager + (eager == 3), eager, None).passed


def test_equal_infinities_and_an_empty_batch_pass() -> None:
    eager = torch.tensor([float("inf"), 1.0, float("nan")])
    assert compare(eager.clone(), eager, eager.double()).passed
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3), None).passed


def test_a_model_whose_output_is_nowhere_finite_is_equal_to_nothing() -> None:
    nothing = torch.full((3, 2), float("nan"))
    assert not compare(nothing.clone(), nothing, None).passed

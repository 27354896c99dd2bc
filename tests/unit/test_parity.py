from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchworker.parity.rule import compare_tensors, usual_loss


def reference() -> tuple[Tensor, Tensor]:
    """A float32 computation and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    inputs = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    return inputs.float() @ weights.float(), inputs.float().double() @ weights.float().double()


def test_the_same_bits_pass() -> None:
    eager, exact = reference()
    assert compare_tensors(eager.clone(), eager, exact).passed


def test_another_order_of_summation_passes() -> None:
    eager, exact = reference()
    other = eager + (exact.float() - eager) * 2
    assert compare_tensors(other, eager, exact).passed


def test_an_error_far_below_the_usual_tolerances_is_caught() -> None:
    eager, exact = reference()
    other = eager + 3e-5
    torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-4)  # what a common rule lets through
    assert not compare_tensors(other, eager, exact).passed


def test_one_wrong_class_among_large_ones_is_caught() -> None:
    eager, exact = reference()
    sizes = torch.tensor([1e-3] + [10.0] * 9)
    eager, exact = eager * sizes, exact * sizes
    other = eager.clone()
    other[:, 0] *= 1.01
    assert not compare_tensors(other, eager, exact).passed


def test_a_sigmoid_may_be_off_by_a_unit_in_the_last_place_of_one() -> None:
    exact = torch.sigmoid(torch.linspace(-7, -4, 64, dtype=torch.float64).view(8, 8))
    eager = exact.float()
    assert compare_tensors(eager + 9e-8, eager, exact).passed
    assert not compare_tensors(eager + 4e-7, eager, exact).passed
    assert not compare_tensors(-eager - 9e-8, -eager, -exact).passed


def test_a_sample_that_falls_the_other_way_in_float64_does_not_loosen_the_rule_for_the_rest() -> None:
    eager, exact = reference()
    exact[5] += 3
    assert compare_tensors(eager.clone(), eager, exact).passed
    other = eager.clone()
    other[20] += 1e-3
    assert not compare_tensors(other, eager, exact).passed
    assert not compare_tensors(eager.index_fill(0, torch.tensor([5]), 60.0), eager, exact).passed


def test_one_wrong_element_is_caught() -> None:
    eager, exact = reference()
    other = eager.clone()
    other[3, 3] += 1e-3
    assert not compare_tensors(other, eager, exact).passed


def test_an_ill_conditioned_model_may_differ_as_much_as_eager_itself_does() -> None:
    eager, exact = reference()
    noisy = eager + 1e-3 * torch.sign(eager)
    assert compare_tensors(noisy - 2e-3 * torch.sign(eager), noisy, exact).passed


def test_one_score_on_which_eager_is_right_by_luck_is_judged_by_what_it_usually_loses() -> None:
    # As a beam search's score on real names: eager loses a dozen roundoffs, on one name in many next to nothing.
    generator = torch.Generator().manual_seed(0)
    exact = -6 * torch.rand(200, generator=generator, dtype=torch.float64) - 0.5
    lost = 12 * 2.0**-24 * torch.randn(2, 200, generator=generator, dtype=torch.float64) * 4
    eager, got = (exact + part for part in lost)
    usual = usual_loss((eager[row : row + 1].float(), exact[row : row + 1]) for row in range(200))
    assert usual == pytest.approx(48 * 2.0**-24, rel=0.2)

    def passes(row: int, extra: float = 0.0, known: float = usual) -> bool:
        one = slice(row, row + 1)
        return compare_tensors((got[one] + extra).float(), eager[one].float(), exact[one], usual=known).passed

    assert all(passes(row) for row in range(200))
    assert not all(passes(row, known=0.0) for row in range(200))
    # Twelve times the same number, as an expanded output has it, says no more than one.
    copies = [tensor[:, None].expand(-1, 12) for tensor in (got.float(), eager.float(), exact)]
    assert all(compare_tensors(*(tensor[row] for tensor in copies), usual=usual).passed for row in range(200))
    assert not any(passes(row, extra=1e-4) for row in range(200))


def test_what_eager_usually_loses_is_not_read_where_there_are_enough_elements() -> None:
    eager, exact = reference()
    other = eager + 3e-5
    assert not compare_tensors(other, eager, exact, usual=1.0).passed


def test_unstable_and_unanswered_questions_do_not_count_for_what_is_usually_lost() -> None:
    one = torch.ones(4)
    assert usual_loss([(one, None), (one, one.double() + 0.5), (one, torch.full((4,), float("nan")))]) == 0.0
    assert usual_loss([(one, one.double() + 1e-7), (one, one.double() + 0.5)]) == pytest.approx(1e-7)


def test_without_float64_the_eager_output_is_the_reference() -> None:
    eager, _ = reference()
    assert compare_tensors(eager.clone(), eager, None).passed
    assert not compare_tensors(eager * 1.001, eager, None).passed


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
    outcome = compare_tensors(got, torch.zeros(2, 2), None)
    assert not outcome.passed and reason in outcome.reason


def test_integers_must_be_equal() -> None:
    eager = torch.arange(6)
    assert compare_tensors(eager.clone(), eager, None).passed
    assert not compare_tensors(eager + (eager == 3), eager, None).passed


def test_equal_infinities_and_an_empty_batch_pass() -> None:
    eager = torch.tensor([float("inf"), 1.0, float("nan")])
    assert compare_tensors(eager.clone(), eager, eager.double()).passed
    assert compare_tensors(torch.zeros(0, 3), torch.zeros(0, 3), None).passed


def test_a_model_whose_output_is_nowhere_finite_is_equal_to_nothing() -> None:
    nothing = torch.full((3, 2), float("nan"))
    assert not compare_tensors(nothing.clone(), nothing, None).passed

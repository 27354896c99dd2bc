"""Batches of outputs as one tensor, for metrics that see all samples at once."""

from __future__ import annotations

import pytest
import torch

from torchworker.project.metrics import joined, metric_sum, sample_sums, standard_error, without


def test_batches_of_one_size_are_put_together_as_they_are() -> None:
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    assert torch.equal(joined(batches), torch.cat(batches))


def test_decoded_sequences_of_several_lengths_are_padded_with_what_is_no_token() -> None:
    got = joined([torch.tensor([[1, 2]]), torch.tensor([[3, 0, 5], [6, 7, 8]]), torch.empty(0, 1, dtype=torch.long)])
    assert got.tolist() == [[1, 2, -100], [3, 0, 5], [6, 7, 8]]


def test_padding_of_floats_cannot_be_taken_for_numbers_and_that_of_masks_is_false() -> None:
    scores = joined([torch.ones(1, 2, 3), torch.ones(1, 3, 2)])
    assert scores.shape == (2, 3, 3) and int(scores.isnan().sum()) == 6
    assert scores[0, :2].eq(1).all() and scores[1, :, :2].eq(1).all()
    assert joined([torch.ones(1, 1).bool(), torch.ones(1, 2).bool()]).tolist() == [[True, False], [True, True]]
    assert joined([torch.ones(1, 1).byte(), torch.ones(1, 2).byte()]).tolist() == [[1, 255], [1, 1]]


def test_batches_of_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number of dimensions, got \[\[1, 2\], \[1\]\]"):
        joined([torch.ones(1, 2), torch.ones(1)])


def test_labels_that_are_none_of_the_classes_do_not_count() -> None:
    scores = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])].transpose(1, 2)
    for padding in (-100, 255, 3):
        target = torch.tensor([[0, 1], [1, padding]])
        assert metric_sum("accuracy", scores, target) == (2.0, 3)
        assert sample_sums("accuracy", scores, target).tolist() == [[2.0, 2.0], [0.0, 1.0]]
    assert metric_sum("accuracy", scores, torch.tensor([[0, 1], [1, 255]], dtype=torch.uint8)) == (2.0, 3)


def test_a_label_that_another_model_has_as_a_class_is_answered_wrong_by_one_that_has_not() -> None:
    scores = torch.eye(3)[torch.tensor([0, 2, 2, 1])]
    target = torch.tensor([0, 3, 255, -100])
    assert sample_sums("accuracy", scores, target).tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert sample_sums("accuracy", scores, target, 4).tolist() == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    # What the other has not is none of its business.
    assert sample_sums("accuracy", scores, target, 2).tolist() == sample_sums("accuracy", scores, target).tolist()


def test_a_missing_answer_of_several_is_not_the_negative_one() -> None:
    logits = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    assert metric_sum("accuracy", logits, torch.tensor([[1.0, float("nan")], [0.0, 1.0]])) == (2.0, 3)


def test_a_class_that_the_loss_ignores_becomes_padding() -> None:
    target = torch.tensor([[0, 1], [2, 0]])
    assert without(target, [0]).tolist() == [[-100, 1], [2, -100]]
    assert without(target.byte(), [0]).tolist() == [[-100, 1], [2, -100]]
    assert without(target, []) is target


def test_the_standard_error_of_a_mean_is_the_known_one_whatever_the_order() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).sort().values
    error = standard_error(lambda part: float(values[part].mean()), len(values))
    assert 0 <= error < 1 / 20_000**0.5
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    error = standard_error(lambda part: float(shuffled[part].mean()), len(values))
    assert error == pytest.approx(1 / 20_000**0.5, rel=0.4)

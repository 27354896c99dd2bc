"""Batches of outputs as one tensor, for metrics that see all samples at once."""

from __future__ import annotations

import pytest
import torch

from torchworker.project.metrics import joined


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

"""What a batch weighs in its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchworker.training.weighting import ignored_labels, is_mean, padding_of, weigh_of

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(12, 3, 5, generator=GENERATOR)
LABELS = torch.randint(0, 3, (12, 5), generator=GENERATOR)
LABELS[3:, 2:] = -100
PADDED = torch.where(LABELS < 0, 255, LABELS)
NUMBERS, TARGETS = torch.randn(12, 5, generator=GENERATOR), torch.rand(12, 5, generator=GENERATOR)
CHANCES = torch.rand(12, 3, 5, generator=GENERATOR).softmax(1)
RARE = torch.tensor([1.0, 50.0, 0.2])


class Preset(nn.CrossEntropyLoss):
    def __init__(self) -> None:
        super().__init__(weight=RARE, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("loss", "outputs", "target"),
    [
        (functional.cross_entropy, SCORES, LABELS),
        (partial(functional.cross_entropy, ignore_index=255), SCORES, PADDED),
        (functional.cross_entropy, SCORES, CHANCES),
        (nn.CrossEntropyLoss(ignore_index=255), SCORES, PADDED),
        (nn.CrossEntropyLoss(weight=RARE), SCORES, LABELS),
        (Preset(), SCORES, LABELS),
        (nn.NLLLoss(weight=RARE), SCORES.log_softmax(1), LABELS),
        (functional.mse_loss, NUMBERS, TARGETS),
        (nn.SmoothL1Loss(), NUMBERS, TARGETS),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), NUMBERS, TARGETS),
    ],
)
def test_parts_weighed_by_what_torchs_loss_divides_by_make_the_loss_of_the_whole(
    loss: Callable[..., Tensor], outputs: Tensor, target: Tensor
) -> None:
    weigh = weigh_of(loss)
    assert weigh is not None
    parts = [slice(0, 4), slice(4, 5), slice(5, 12)]
    whole = sum(float(loss(outputs[part], target[part])) * weigh(target[part]) for part in parts) / weigh(target)
    assert whole == pytest.approx(float(loss(outputs, target)), rel=1e-5)


def words_first(outputs: Tensor, target: Tensor) -> Tensor:
    """Of outputs [batch, length, classes], as losses over sequences are written."""
    return functional.cross_entropy(outputs.flatten(0, 1), target.flatten(), ignore_index=0)


def masked(outputs: Tensor, target: Tensor) -> Tensor:
    known = (target != 255).float()
    each = functional.cross_entropy(outputs, target.clamp_max(2), reduction="none")
    return (each * known).sum() / known.sum()


def of_each_sequence(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean over sequences of their own means, which is what somebody wants now and then."""
    known = (target >= 0).float()
    each = functional.cross_entropy(outputs, target, reduction="none")
    return ((each * known).sum(1) / known.sum(1)).mean()


def of_all(outputs: Tensor, target: Tensor) -> Tensor:
    return -outputs.log_softmax(1).gather(1, target[:, None]).mean()


class WithPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=2)

    def forward(self, outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        return self.loss(outputs["logits"], target) + 0 * outputs["other"].sum()  # type: ignore[no-any-return]


def plain(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, target)


def by_class(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, target, weight=RARE)


def binary(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, target.float())


FULL = LABELS.clamp_min(0)


@pytest.mark.parametrize(
    ("loss", "outputs", "target", "label"),
    [
        (plain, SCORES, LABELS, -100),
        # Asked where no batch has padding.
        (plain, SCORES[:, :, 0], FULL[:, 0], -100),
        (words_first, SCORES.transpose(1, 2), FULL, 0),
        (masked, SCORES, PADDED, 255),
        (WithPadding(), {"logits": SCORES, "other": NUMBERS}, FULL, 2),
        (of_each_sequence, SCORES, FULL, None),
        (of_all, SCORES, FULL, None),
        (partial(functional.cross_entropy, reduction="sum"), SCORES, LABELS, None),
        (by_class, SCORES, LABELS, None),
        (lambda outputs, target: functional.mse_loss(outputs, target), NUMBERS, TARGETS, None),
        (binary, NUMBERS, FULL.clamp_max(1), None),
        (lambda outputs, target: outputs.sum() * 0, SCORES, LABELS, None),
    ],
)
def test_the_label_that_a_loss_of_ones_own_leaves_out_is_found_by_asking_it(
    loss: Any, outputs: Any, target: Tensor, label: int | None
) -> None:
    assert padding_of(loss, outputs, target) == label


def test_a_text_over_a_large_vocabulary_is_not_asked_about() -> None:
    # Two samples of it are half a gigabyte of made-up answers.
    outputs = torch.zeros(1, 1, 1).expand(2, 2**16, 2**10)
    assert padding_of(words_first, outputs, torch.zeros(2, 2**16, dtype=torch.long)) is None


def test_torchs_own_losses_are_known_and_not_asked() -> None:
    assert padding_of(functional.cross_entropy, SCORES, LABELS) is None


def test_of_other_losses_nothing_is_known() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) ** 2

    for loss in (Focal(), nn.CrossEntropyLoss(reduction="sum"), lambda outputs, target: outputs.sum()):
        assert weigh_of(loss) is None


@pytest.mark.parametrize(
    ("loss", "mean"),
    [
        (lambda outputs, target: (outputs - target).square().mean(), True),
        (lambda outputs, target: ((outputs - target) * (1 + 9 * (target > 0.5))).abs().mean(), True),
        (lambda outputs, target: (outputs - target).square().sum(), False),
        # Weighted by class, over valid elements, of pairs in the batch.
        (lambda outputs, target: ((outputs - target).abs() * target).sum() / target.sum(), False),
        (lambda outputs, target: (outputs - target)[target > 0.5].abs().mean(), False),
        (lambda outputs, target: torch.cdist(outputs, outputs).mean(), False),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_seen(loss: Callable[..., Tensor], mean: bool) -> None:
    assert is_mean(loss, NUMBERS, TARGETS) is mean


def focal(outputs: Any, target: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs["scores"], target, ignore_index=2, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


@pytest.mark.parametrize(
    ("loss", "outputs", "ignored"),
    [
        (nn.CrossEntropyLoss(ignore_index=0), SCORES, [0]),
        (focal, {"scores": SCORES}, [2]),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0])), SCORES, [2]),
        (functional.cross_entropy, SCORES, []),
        (nn.CrossEntropyLoss(label_smoothing=0.1), SCORES, []),
        # It wants chances, and cannot be asked with anything.
        (lambda outputs, target: functional.nll_loss(outputs.log(), target), SCORES, []),
        (functional.mse_loss, NUMBERS, []),
    ],
)
def test_classes_that_mean_nothing_to_the_loss_are_found_by_its_gradient(
    loss: Callable[..., Tensor], outputs: Any, ignored: list[int]
) -> None:
    assert ignored_labels(loss, outputs, LABELS.clamp_min(0)) == ignored

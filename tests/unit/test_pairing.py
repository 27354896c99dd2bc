"""Outputs that are compared with every target instead of their own."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchworker.contract import CustomMetric, Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.pairing import require_pairs

MODULE = "paired_by_tests"


@pytest.fixture
def project_with() -> Iterator[Callable[..., Project]]:
    """A project whose loss or metric is this function."""
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module

    def make(loss: str | None = None, metric: Callable[..., Any] | None = None) -> Project:
        module.metric = metric  # type: ignore[attr-defined]
        reference = Reference(target=f"{MODULE}:metric", where="train.metrics")
        metrics = [CustomMetric(name="metric", reference=reference, better="lower")] if metric else []
        return Project(
            name="p", folder="/nowhere", model=Reference(target="m:n", where="model.factory"),
            data=Reference(target="m:d", where="data.factory"),
            loss=loss or Reference(target=f"{MODULE}:loss", where="train.loss"), metrics=(), custom_metrics=metrics,
        )  # fmt: skip

    yield make
    del sys.modules[MODULE]


GENERATOR = torch.Generator().manual_seed(0)
COLUMN, NUMBERS = torch.randn(32, 1, generator=GENERATOR), torch.randn(32, generator=GENERATOR)
LABELS = torch.arange(32) % 2
MAPS, MASKS = torch.randn(8, 1, 4, 4, generator=GENERATOR), (torch.randn(8, 4, 4, generator=GENERATOR) > 0).float()


def error(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).abs().mean()


def masked(outputs: Any, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy(outputs["score"].sigmoid(), target.expand(32, 32))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss"])
def test_torchs_own_losses_are_refused_by_the_shapes(project_with: Callable[..., Project], name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} compares each output .*\[32, 1\] .*\[32\] broadcast to \[32, 32\]"):
        require_pairs(getattr(functional, name), COLUMN, NUMBERS, project_with(name))


@pytest.mark.parametrize(
    ("loss", "outputs", "target"),
    [
        (lambda outputs, target: ((outputs - target) ** 2).mean(), COLUMN, NUMBERS),
        (nn.HuberLoss(), COLUMN, NUMBERS),
        # The other way round.
        (error, NUMBERS, COLUMN),
        # Whole numbers, a dict of outputs, maps.
        (lambda outputs, target: error(outputs["score"], target), {"score": COLUMN, "other": COLUMN}, LABELS),
        (lambda outputs, target: error(outputs.sigmoid(), target), MAPS, MASKS),
    ],
)
def test_a_loss_of_ones_own_is_asked(
    project_with: Callable[..., Project], loss: Callable[..., Any], outputs: Any, target: Tensor
) -> None:
    with pytest.raises(UserError, match="compares each output with the target of every sample"):
        require_pairs(loss, outputs, target, project_with())


@pytest.mark.parametrize(
    ("loss", "outputs", "target"),
    [
        (lambda outputs, target: error(outputs.squeeze(1), target), COLUMN, NUMBERS),
        (lambda outputs, target: error(outputs, target[:, None]), COLUMN, NUMBERS),
        (lambda outputs, target: functional.binary_cross_entropy_with_logits(outputs[:, 0], target), MAPS, MASKS),
        # Of one shape all is well, and scores of classes are of another number.
        (error, NUMBERS, NUMBERS.flip(0)),
        (functional.cross_entropy, torch.randn(32, 3), LABELS),
        # An energy, which looks at no target at all; a loss that fails is told elsewhere.
        (lambda outputs, target: outputs.square().mean(), COLUMN, NUMBERS),
        (lambda outputs, target: functional.cross_entropy(outputs, target), COLUMN, NUMBERS),
    ],
)
def test_a_loss_that_brings_them_together_itself_is_not_refused(
    project_with: Callable[..., Project], loss: Callable[..., Any], outputs: Any, target: Tensor
) -> None:
    require_pairs(loss, outputs, target, project_with())


def test_a_metric_is_asked_as_a_loss_is(project_with: Callable[..., Project]) -> None:
    with pytest.raises(UserError, match=r"train\.metrics: paired_by_tests:metric compares each output"):
        require_pairs(None, COLUMN, NUMBERS, project_with("mse_loss", error))
    for sound in (
        lambda outputs, target: error(outputs.flatten(), target),
        lambda outputs, target: ((outputs.flatten() > 0) == (target > 0.5)).float().mean(),
    ):
        require_pairs(None, COLUMN, NUMBERS, project_with("mse_loss", sound))


def test_a_loss_with_a_memory_is_left_as_it_was(project_with: Callable[..., Project]) -> None:
    class Warms(nn.Module):
        calls = 0

        def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return error(outputs.squeeze(1), target) * torch.rand(())

    loss, before = Warms(), torch.get_rng_state()
    require_pairs(loss, COLUMN, NUMBERS, project_with())
    assert loss.calls == 0 and torch.equal(torch.get_rng_state(), before)

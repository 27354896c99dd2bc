"""What a batch weighs in a mean loss: what the loss divides by, which need not be its number of samples.

A mean over valid tokens, or with class weights, is the same in one batch as in its parts only if the parts weigh what
they count for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchworker import situations
from torchworker.contract import Project, TrainSettings
from torchworker.project.metrics import FILLED, first_output
from torchworker.project.outputs import mapped
from torchworker.project.pairing import asked_apart, with_first
from torchworker.project.user_code import Loss

Weigh = Callable[[Tensor], float]
"""From the target of a batch, [batch, …], on the CPU, to what its loss divides by."""

OVER_ELEMENTS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.BCELoss)
ELEMENTWISE = (
    nn.functional.mse_loss,
    nn.functional.l1_loss,
    nn.functional.smooth_l1_loss,
    nn.functional.huber_loss,
    nn.functional.binary_cross_entropy,
    nn.functional.binary_cross_entropy_with_logits,
)
"""The same as functions."""
OVER_LABELS = (nn.CrossEntropyLoss, nn.NLLLoss)
MEAN = 1e-4
"""Relative difference up to which a loss is the mean of those of its parts."""
DRAWS = 2
LABELS = 1000
PADDINGS = (FILLED, 0, -1, 255)
"""Labels that are often used for padding; the commonest ones of a batch are asked too."""
PLANTED = (0.3, 0.7)
"""Parts of the places of some samples at which such a label is put."""
PADDED_SAMPLES = 8
"""Samples on which that is asked."""
ANSWERS = 2**26
"""Numbers that are made up for it at a time. Two samples of a long text over a large vocabulary may need more."""
TINY = 1e-30


def weigh_of(loss: Loss) -> Weigh | None:
    """How torch's own losses weigh a batch; None for one that cannot be known. loss: from `build_loss`."""
    function, given = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    if given.get("reduction", "mean") == "mean":
        if function in (nn.functional.cross_entropy, nn.functional.nll_loss):
            return _over_labels(given.get("ignore_index", FILLED), given.get("weight"))
        if function in ELEMENTWISE:
            return _over_elements
    # A class of the user's that only presets arguments is one of torch's too.
    if isinstance(loss, (*OVER_ELEMENTS, *OVER_LABELS)) and loss.reduction == "mean":
        kind = next(kind for kind in type(loss).__mro__ if kind in (*OVER_ELEMENTS, *OVER_LABELS))
        if type(loss).forward is kind.forward:
            if isinstance(loss, OVER_LABELS):
                return _over_labels(loss.ignore_index, loss.weight)
            return _over_elements
    return None


class StepWeights:
    """What the loss of each batch of an optimizer step is multiplied by. Every rank makes one."""

    def __init__(self, loss: Loss, settings: TrainSettings, device: torch.device) -> None:
        """
        Args:
            loss: from `build_loss`.
            settings: into how many parts a step falls.
            device: where gradients are.
        """
        weigh = weigh_of(loss)
        self._loss, self._settings, self._device = loss, settings, device
        self._known = weigh is not None
        self._noted = False
        self._world = dist.get_world_size()
        self.of: Weigh = weigh if weigh is not None else by_samples
        """What a batch weighs; where that is not known, its number of samples."""

    def leave_out(self, label: int | None) -> None:
        """Of a loss that is not torch's own: the label that `padding_of` found, if any."""
        if label is not None and not self._known:
            self.of, self._known = _over_labels(label, None), True

    def shares(self, weights: Sequence[float]) -> Callable[[], Sequence[float | Tensor | None]]:
        """Factors of the losses of this rank's batches of a step; None for 1. Every rank calls it.

        The gradients are then those of one batch on one rank: ranks are averaged.

        Returns:
            What gives them. The ranks exchange their weights meanwhile, so it is called after the first forward pass.
        """
        if not self._known or self._world == 1:
            return functools.partial(_factors, weights, sum(weights))
        whole = torch.tensor(sum(weights), dtype=torch.float64, device=self._device)
        exchange = dist.all_reduce(whole, async_op=True)

        @functools.cache
        def answer() -> Sequence[float | Tensor | None]:
            exchange.wait()
            if self._device.type != "cpu":
                # Nobody waits for the GPU.
                return [weight * self._world / whole.clamp_min(TINY) for weight in weights]
            return _factors(weights, float(whole) / self._world)

        return answer

    def notes(self, outputs: Any, target: Tensor, project: Project) -> list[str]:
        """What there is to say, once, of a step whose loss is not that of its parts.

        Args:
            outputs: what forward gave on a batch of training samples.
            target: [batch, …].
            project: names the loss.
        """
        asked = self._known or self._world * self._settings.accumulate == 1 or self._noted
        if asked or is_mean(self._loss, outputs, target):
            return []
        self._noted = True
        return [no_mean(project, self._settings)]


def _factors(weights: Sequence[float], mean: float) -> Sequence[float | None]:
    return [None if weight == mean else weight / max(mean, TINY) for weight in weights]


def by_samples(target: Tensor) -> float:
    """What a batch weighs of whose loss nothing is known."""
    return float(len(target))


def no_mean(project: Project, settings: TrainSettings) -> str:
    """What there is to say of a loss that `is_mean` denies, where a step has several parts."""
    name = project.loss if isinstance(project.loss, str) else project.loss.target
    parts = [f"{settings.processes} processes"] if settings.processes > 1 else []
    parts += [f"accumulate {settings.accumulate}"] if settings.accumulate > 1 else []
    return (
        f"train.loss: {name} {situations.NO_MEAN}, so {' and '.join(parts)} train by "
        "other gradients than one process with the whole batch would; class weights and ignored labels are weighed "
        "right in torch's own losses (torch.nn:CrossEntropyLoss)"
    )


def _over_elements(target: Tensor) -> float:
    return float(target.numel())


def _over_labels(ignored: int, weight: Tensor | None) -> Weigh:
    def weigh(target: Tensor) -> float:
        if target.is_floating_point():
            # Probabilities of classes: torch divides by the number of samples, or of their positions.
            return target.numel() / target.shape[1]
        kept = target[target != ignored]
        return float(kept.numel()) if weight is None else float(weight.detach().cpu()[kept].double().sum())

    return weigh


@torch.no_grad()
def is_mean(loss: Loss, outputs: Any, target: Tensor) -> bool:
    """Whether the loss of a batch is the mean of those of its halves, by samples; True where it cannot be asked.

    Args:
        loss: from `build_loss`.
        outputs: what forward gave, its tensors [batch, …].
        target: [batch, …].
    """
    size = len(target)
    if size < 2:
        return True
    ask = asked_apart(loss)
    order = torch.argsort(target.detach().reshape(size, -1)[:, 0].double().cpu(), stable=True).to(target.device)
    try:
        whole = float(ask(outputs, target))
        for places in (torch.arange(size, device=target.device), order):
            parts = [places[: size // 2], places[size // 2 :]]
            mean = sum(len(part) / size * float(ask(_at(outputs, part, size), target[part])) for part in parts)
            if not abs(whole - mean) <= MEAN * max(abs(whole), abs(mean)):
                return False
    except Exception:
        return True
    return True


@torch.no_grad()
def padding_of(loss: Loss, outputs: Any, target: Tensor) -> int | None:
    """The label that a loss leaves out of a mean over the others, as padding is; None where it is no such loss.

    Asked on made-up answers and on labels with that one at some places: the loss is then the mean of those of its parts
    by their numbers of other labels.

    Args:
        loss: from `build_loss`; asked on the CPU, where a label that is none raises an error.
        outputs: what forward gave, its tensors [batch, …].
        target: [batch, …].
    """
    if weigh_of(loss) is not None or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    try:
        output = first_output(outputs)
    except TypeError:
        return None
    size = min(len(target), PADDED_SAMPLES, ANSWERS // max(1, output[:1].numel()))
    labels = target[:size].cpu()
    if size < 2:
        return None
    try:
        few = mapped(Tensor.cpu, _at(outputs, torch.arange(size, device=target.device), len(target)))
        ask = asked_apart(copy.deepcopy(loss).cpu() if isinstance(loss, nn.Module) else loss)
        present, counts = torch.unique(labels, return_counts=True)
        common = present[counts.argsort(descending=True)].tolist()
        generator = torch.Generator().manual_seed(0)
        for label in dict.fromkeys([*PADDINGS, *common[:3]]):
            # In the place of padding that is there, so that it is known which labels count.
            other = next(one for one in [*common, 0, 1] if one not in (label, FILLED))
            counted = torch.where(labels == label, other, labels)
            if all(_leaves_out(ask, few, counted, label, part, generator) for part in PLANTED):
                return int(label)
    except Exception:
        # It cannot be asked in this way.
        return None
    return None


def _leaves_out(ask: Loss, outputs: Any, target: Tensor, label: int, part: float, generator: torch.Generator) -> bool:
    """Whether it does, with the label at a part of the places of the first half of a target that has none of it."""
    half = len(target) // 2
    planted = target.clone()
    first = planted[:half].flatten()
    first[torch.randperm(len(first), generator=generator)[: round(part * len(first))]] = label
    planted[:half] = first.reshape(planted[:half].shape)
    output = first_output(outputs)
    answers = with_first(outputs, torch.randn(output.shape, generator=generator).to(output.dtype))
    halves = [torch.arange(half), torch.arange(half, len(target))]
    weights = [int((planted[places] != label).sum()) for places in halves]
    if not weights[0] or weights[0] == len(first):
        # One sample of one label cannot be told apart.
        return False
    try:
        whole = float(ask(answers, planted))
        each = [float(ask(_at(answers, places, len(target)), planted[places])) for places in halves]
    except Exception:
        return False
    mean = sum(weight * value for weight, value in zip(weights, each, strict=True)) / sum(weights)
    return whole != 0 and abs(whole - mean) <= MEAN * max(abs(whole), abs(mean))


def _at(outputs: Any, places: Tensor, size: int) -> Any:
    return mapped(lambda tensor: tensor[places] if tensor.dim() and len(tensor) == size else tensor, outputs)


@torch.enable_grad()
def ignored_labels(loss: Loss, outputs: Any, target: Tensor) -> list[int]:
    """Labels among the model's classes that mean nothing to the loss, as padding with a class's number does.

    The gradient of the loss is zero at every place that has such a label, whatever the answers are.

    Args:
        loss: from `build_loss`.
        outputs: what forward gave; its first tensor is [batch, classes, …].
        target: [batch, …], whole numbers.
    """
    try:
        output = first_output(outputs)
    except TypeError:
        return []
    if target.is_floating_point() or target.is_complex() or output.dim() != target.dim() + 1 or output.shape[1] < 2:
        return []
    present = torch.unique(target)
    present = present[(present >= 0) & (present < output.shape[1])][:LABELS]
    silent = torch.ones(len(present), dtype=torch.bool)
    ask = asked_apart(loss)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        answer = torch.randn(output.shape, generator=generator).to(output.device, output.dtype).requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(ask(with_first(outputs, answer), target), answer)
        except Exception:
            return []
        felt = gradient.abs().amax(1) > 0
        if not bool(felt.any()):
            return []
        for place, label in enumerate(present):
            silent[place] &= not bool(felt[target == label].any())
    return [int(label) for label in present[silent.to(present.device)]]

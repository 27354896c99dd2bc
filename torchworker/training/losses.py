"""The losses of a rank's steps: read at once on a CPU, a step late on a GPU.

To read a number is to wait until the GPU has made it, and the GPU then waits for the next batch. So its copy is asked
for with the step it belongs to, and read when the step after that has been handed over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Of a loss, on its way to the CPU."""

    value: Tensor
    arrived: torch.cuda.Event
    weight: float
    step: int


class Losses:
    """Checks and sums the losses of one epoch of one rank."""

    def __init__(self, refuse: Callable[[float, int], None]) -> None:
        """refuse: called with a loss that is not finite and the number of its step; raises."""
        self._refuse = refuse
        self._under_way: deque[_Copy] = deque()
        self.sums = torch.zeros(2, dtype=torch.float64)
        """Loss times weight, and weight, of what was read so far."""
        self.last: float | None = None
        """The newest that was read."""

    def add(self, loss: Tensor, weight: float, step: int) -> None:
        """Take a loss (one number) and its weight, on its device; on the CPU it is read before this returns."""
        if loss.device.type == "cpu":
            self._read(float(loss.detach()), weight, step)
            return
        # Pinned, because it is asked for without waiting.
        value = loss.detach().to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._under_way.append(_Copy(value=value, arrived=arrived, weight=weight, step=step))

    def settle(self, before: float = math.inf) -> None:
        """Read what is still under way of the steps before this one."""
        while self._under_way and self._under_way[0].step < before:
            copy = self._under_way.popleft()
            copy.arrived.synchronize()
            self._read(float(copy.value), copy.weight, copy.step)

    def _read(self, loss: float, weight: float, step: int) -> None:
        if not math.isfinite(loss):
            self._refuse(loss, step)
        self.last = loss
        self.sums += torch.tensor([loss * weight, weight], dtype=torch.float64)

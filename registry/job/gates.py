"""The `gates` part of a job file: limits on what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from torchworker.contract import SPEED_GATES
from train_and_ship.registry.job.base import Part


class Gate(Part):
    """Limits on one measurement; a candidate outside them is not registered and not promoted."""

    min: float | None = None
    """smallest value that passes; of quality only"""
    max: float | None = None
    """largest value that passes"""
    vs_live: float | None = None
    """smallest improvement over the live release that passes; negative allows a loss; of quality only"""
    times_live: float | None = Field(None, gt=0)
    """largest multiple of the live release's value that passes, both measured in one run: 1.1 allows a tenth more; of
    p50_ms, p99_ms, load_ms, size_mb and memory_mb only"""

    @model_validator(mode="after")
    def _has_limit(self) -> Self:
        if self.min is None and self.max is None and self.vs_live is None and self.times_live is None:
            raise ValueError("at least one of min, max, vs_live, times_live")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min <= max, and {self.min:g} > {self.max:g}")
        return self


def require_fitting(gates: Mapping[str, Gate]) -> None:
    """Raises ValueError for a limit that what it is put on does not have."""
    for name, gate in gates.items():
        if name in SPEED_GATES:
            if gate.min is not None or gate.vs_live is not None:
                raise ValueError(f"only max and times_live for {name}, of which less is better")
            if gate.max is not None and gate.max <= 0:
                raise ValueError(f"a max above 0 for {name}")
        elif gate.times_live is not None:
            raise ValueError(f"vs_live for {name}; times_live is for {', '.join(SPEED_GATES)}")

"""The `observe` part of a job file: what of requests servers may keep, of how many, and for how long."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from shipreader.observation_files import MOST_COLUMNS
from train_and_ship.registry.job.base import Part

KEEP_DAYS = 30
"""Where no job says anything."""
Column = Annotated[str, Field(min_length=1, max_length=128)]


class Columns(Part):
    """Names of what is kept; the rest of a request is not."""

    inputs: Annotated[tuple[Column, ...], Field(strict=False)] = ()
    """inputs by name; of several samples in one request the first one's"""
    outputs: Annotated[tuple[Column, ...], Field(strict=False)] = ()
    """outputs by name"""

    @model_validator(mode="after")
    def _are_few_and_different(self) -> Self:
        for side, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if len(names) > MOST_COLUMNS:
                raise ValueError(f"at most {MOST_COLUMNS} names in {side}, not {len(names):,}")
            if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
                raise ValueError(f"each of {side} once, and {twice} is there twice")
        return self


class Observe(Part):
    """What servers write down of requests; it goes along with the release, and what is live decides."""

    columns: Columns = Columns()
    """names of inputs and outputs whose values are kept: numbers, texts of at most 512 characters, vectors of at most
    64 numbers; no values are kept when absent"""
    sample: float = Field(1.0, gt=0, le=1)
    """share of requests that are written down at all"""
    keep_days: int = Field(KEEP_DAYS, ge=1, le=3650)
    """`ship gc` deletes observations that are older"""

"""The part of a job file that says how a release gets its share of the requests: `release.rollout`."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from train_and_ship.registry.decision.limits import StopIf
from train_and_ship.registry.job.base import Part

MOST_STEPS = 100
LONGEST_HOURS = 24 * 366
LOOK_SECONDS = 60
"""Within which whoever watches a rollout sees that a step has stood long enough."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([1-9]\d{0,7})([smhd])", re.ASCII)


def _are_steps(steps: tuple[float, ...]) -> tuple[float, ...]:
    """The sentence says what was expected; what was given follows it."""
    if not 1 <= len(steps) <= MOST_STEPS:
        raise ValueError(f"1 to {MOST_STEPS} percentages")
    for step in steps:
        if not 0 < step <= 100:
            raise ValueError(f"percentages above 0 and up to 100, of which {step:g} is none")
        if abs(step * 100 - round(step * 100)) > 1e-6:
            raise ValueError(f"percentages in hundredths at the finest, such as 0.05, of which {step:g} is none")
    for low, high in pairwise(steps):
        if low >= high:
            raise ValueError(f"percentages that rise, and {high:g} follows {low:g}")
    if steps[-1] != 100:
        raise ValueError(f"100 as the last percentage, after which the release goes live, and it is {steps[-1]:g}")
    return steps


def _is_duration(text: str) -> str:
    if _DURATION.fullmatch(text) is None or seconds_of(text) > 3600 * LONGEST_HOURS:
        raise ValueError("a number and one of s, m, h, d, such as 10m, a year at most")
    return text


def _is_key(text: str) -> str:
    if not text or not text.isprintable() or len(text.encode()) > 1024:
        raise ValueError("the name of what requests are split by, such as user_id")
    return text


def _are_limits(given: dict[str, str | float]) -> dict[str, str | float]:
    StopIf.parse(given)
    return given


def seconds_of(duration: str) -> int:
    """Of `90s`, `10m`, `2h` or `1d`."""
    number, unit = duration[:-1], duration[-1]
    return int(number) * _UNITS[unit]


class Rollout(Part):
    """How a release gets its share of the requests before it is live."""

    steps: Annotated[tuple[float, ...], AfterValidator(_are_steps)] = Field((1, 5, 25, 100), strict=False)
    """percentages of the requests that go to the release, which rise to 100"""
    every: Annotated[str, AfterValidator(_is_duration)] = "10m"
    """how long each of them stands at least: 90s, 10m, 2h, 1d"""
    key: Annotated[str, AfterValidator(_is_key)] = "user_id"
    """name of what requests are split by: the same value gets the same release; requests without it get the live one"""
    max_hours: float = Field(24, gt=0, le=LONGEST_HOURS)
    """a rollout that is not at its end by then ends as undecided, and what was live stays"""
    fallback_ms: int = Field(0, ge=0, le=3_600_000)
    """milliseconds after which a request that the release has not answered is answered by the live one; 0: no limit"""
    shadow: bool = False
    """true: the live release answers all requests, and the new one is only asked beside it"""
    stop_if: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=200)], str | Finite], AfterValidator(_are_limits)
    ] = Field(default_factory=dict, max_length=100)
    """limits by what is measured, such as {errors: +0.5%}, kept with the rollout; by: a column of observe.columns; see
    rollout-decisions.md"""

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, given: Any) -> Any:
        # `600` and no unit: seconds are meant as often as minutes.
        if isinstance(given, dict) and isinstance(every := given.get("every"), int | float):
            raise ValueError(f"every with its unit, such as {every}s or {every}m")
        return given

    @model_validator(mode="after")
    def _ends_in_time(self) -> Self:
        needed = len(self.steps) * (self.seconds + LOOK_SECONDS) / 3600
        if needed > self.max_hours:
            raise ValueError(
                f"max_hours of at least {math.ceil(needed * 100) / 100:g} with {len(self.steps)} steps of {self.every} "
                "and a minute for each look, or it ends undecided by the clock alone"
            )
        return self

    @property
    def seconds(self) -> int:
        """Of `every`."""
        return seconds_of(self.every)

    @property
    def by(self) -> str:
        """The column of `stop_if` whose values are told apart; empty for none."""
        return StopIf.parse(self.stop_if).by

    @property
    def shares(self) -> tuple[int, ...]:
        """The steps in hundredths of a percent."""
        return tuple(round(step * 100) for step in self.steps)

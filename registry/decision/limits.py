"""`stop_if`: how much worse a candidate may do than the live release, in words that a person writes.

    stop_if: {errors: +0.5%, p99_ms: 1.3x, accuracy: -0.01, by: country}

Raises ValueError that says what was expected, as the parts of a job do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torchworker.contract import METRICS, TORCHMETRICS

MOST_LIMITS = 8
"""False alarms are shared out among the limits: with more, each would need far more requests."""
BY = "by"
"""The key that names a column whose values are looked at one by one."""
EXAMPLES = {
    "errors": "+0.5% (half a point more than live) or 2x (twice as many)",
    "latency": "1.3x (the candidate's at most 1.3 times live's)",
    "disagreement": "2% (of the answers in shadow)",
    "metric": "-0.01 (at most so much lower than live) or, where lower is better, +0.01",
}
_QUANTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,2})?)_ms")
_NUMBER = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]-?\d{1,2})?\s*(%|x?)")
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one measurement of the candidate may be, given live's: at most `times` live's plus `margin`.

    Of a metric of which less is worse both sides are taken with the other sign, so that more is worse for every limit.
    """

    name: str
    kind: Literal["errors", "latency", "disagreement", "metric"]
    text: str
    """As it was written."""
    times: float = 1.0
    """How often live's value counts. Of a latency it multiplies milliseconds, and not shares: see `quantile`."""
    margin: float = 0.0
    """In the measurement's own unit; of shares a fraction: 0.005 for half a point."""
    less_is_worse: bool = False
    quantile: float = 0.0
    """Of a latency: 0.99 for p99_ms."""

    @property
    def scale(self) -> float:
        """The difference that it is about, for which the test is tuned; whatever it is, the test is valid."""
        return 1 - self.quantile if self.kind == "latency" else self.margin or 0.005

    @property
    def is_share(self) -> bool:
        """Whether single requests are 0 or 1."""
        return self.kind != "metric"


@dataclass(frozen=True, kw_only=True)
class StopIf:
    """The limits of a rollout, in the order of the job; without any only time decides."""

    limits: tuple[Limit, ...] = ()
    by: str = ""
    """A column that `observe` keeps; the limits are looked at for each of its values too."""

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> Self:
        """From the mapping of a job, or of a rollout's record. Raises ValueError for what is no limit."""
        names = {name: value for name, value in given.items() if name != BY}
        if len(names) > MOST_LIMITS:
            raise ValueError(f"at most {MOST_LIMITS} limits in stop_if, not {len(names)}")
        by = given.get(BY, "")
        if not isinstance(by, str) or (BY in given and not (0 < len(by) <= 200 and by.isprintable())):
            raise ValueError(f"the name of one column in stop_if.{BY}, not {_short(by)}")
        if by and not names:
            raise ValueError(f"a limit in stop_if beside {BY}, such as errors: +0.5%")
        return cls(limits=tuple(parse_limit(name, value) for name, value in names.items()), by=by)

    def document(self) -> dict[str, str]:
        """What `parse` reads back, for the record of a rollout."""
        return {limit.name: limit.text for limit in self.limits} | ({BY: self.by} if self.by else {})


def parse_limit(name: str, value: object) -> Limit:
    """One entry of `stop_if`. YAML makes a number of +0.01 and leaves +1% and 1.3x text; both are taken."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"errors, disagreement, p99_ms or a metric's name in stop_if, not {_short(name)}")
    quantile = _QUANTILE.fullmatch(name)
    if (quantile and not 0 < float(quantile[1]) < 100) or (not quantile and re.fullmatch(r"p\d.*|.*_ms", name)):
        raise ValueError(f"a percentile of latency such as p50_ms, p99_ms or p99.9_ms in stop_if, not {name}")
    kind = name if name in ("errors", "disagreement") else "latency" if quantile else "metric"
    if name in TORCHMETRICS and name != "mean_absolute_percentage_error":
        raise ValueError(f"a mean over requests in stop_if, such as accuracy; {name} is of all requests at once")
    sign, number, unit = _read(name, kind, value)
    text = f"{'-' if sign < 0 else '+' if sign > 0 else ''}{number * (100 if unit == '%' else 1):.12g}{unit}"
    match kind, sign, unit:
        case "errors", 1, "%" if number < 1:
            return Limit(name=name, kind="errors", text=text, margin=number)
        case "errors", 0, "x" if 1 <= number <= 1000:
            return Limit(name=name, kind="errors", text=text, times=number)
        case "latency", 0, "x" if 1 <= number <= 1000 and quantile:
            return Limit(name=name, kind="latency", text=text, times=number, quantile=float(quantile[1]) / 100)
        case "disagreement", 0, "%" if 0 < number < 1:
            return Limit(name=name, kind="disagreement", text=text, times=0, margin=number)
        case "metric", -1 | 1, "" | "%" if number > 0:
            better = METRICS.get(name)
            if better == ("higher" if sign > 0 else "lower"):
                worse = "-" if sign > 0 else "+"
                raise ValueError(f"{name}: {worse}{number:g}, as {better} is better, and not {_short(value)}")
            return Limit(name=name, kind="metric", text=text, margin=number, less_is_worse=sign < 0)
    raise ValueError(f"{EXAMPLES[kind]} for {name}, not {_short(value)}")


def _read(name: str, kind: str, value: object) -> tuple[int, float, str]:
    """Sign (0 where none is written), number (of percent a fraction) and unit: "", % or x."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # YAML has read the sign away; 0 has none.
        return (value > 0) - (value < 0), abs(float(value)), ""
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) and len(value) <= 40 else None
    if not found:
        raise ValueError(f"{EXAMPLES[kind]} for {name}, not {_short(value)}")
    number = abs(float(found[0].rstrip("%x ")))
    return {"+": 1, "-": -1, "": 0}[found[1]], number / 100 if found[3] == "%" else number, found[3]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

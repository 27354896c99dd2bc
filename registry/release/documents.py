"""What a release says of itself in numbers, looked at once, when it is read: whoever published it wrote them.

Sums, logarithms, charts and records are made of these numbers, for releases that others make. What another version
left out or wrote in another shape tells nothing; a number that cannot be is an error in words.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torchworker.contract import FORMAT_FILES, INT8_FILES, LATENCY, THROUGHPUT, InspectResult, MeasureResult, decode
from train_and_ship.infra.shown import on_one_line

MOST_COUNT = 2**53
"""Of samples, values, bytes or calls: what a JSON number can count everywhere."""
LARGEST = 1e100
"""Of milliseconds: charts multiply them."""
LONGEST_NAME, LONGEST_TEXT = 1000, 10_000
"""Characters."""
MOST_SPEEDS = 1000
"""Batch sizes of a format."""
PURPOSES = (LATENCY, THROUGHPUT)
Kind = TypeVar("Kind")


def recall(kind: type[Kind], value: Any) -> Kind | None:
    """What some version of this application wrote down, which may be another one.

    Args:
        kind: A dataclass.
        value: Plain values, as JSON gives them.

    Returns:
        Without the fields that this version does not know; None when one is missing that it needs.
    """
    try:
        found: Kind = decode(kind, value, lenient=True)
        return found
    except (TypeError, AttributeError):
        return None


def told_data(document: Mapping[str, Any]) -> InspectResult | None:
    """What its data was like, by its `data.json`; None where it does not say, or says it in another shape.

    Names of classes are left out: they are texts, which registry/kind.py compares.

    Raises:
        ValueError: A count is none, a number is not finite, or percentiles do not ascend.
    """
    found = recall(InspectResult, {**document, "classes": ()})
    if found is not None:
        _require_sound(found, "")
        for split in (found.train, found.validation):
            for name, column in split.columns.items():
                if any(one > two for one, two in itertools.pairwise(column.quantiles)):
                    raise ValueError(f"columns.{on_one_line(name, 80)}.quantiles: expected ascending numbers")
    return found


def told_speed(document: Mapping[str, Any]) -> MeasureResult | None:
    """How fast it was when it was made, by its `verdicts.json`; None where it does not say, or in another shape.

    Only times of formats that this version knows: nothing else is compared.

    Raises:
        ValueError: A number is negative or not finite, or there are more of them than anybody measures.
    """
    said = document.get("speed")
    if not isinstance(said, Mapping) or not isinstance(measured := said.get("measured"), Mapping):
        return None
    known = {name: item for name, item in measured.items() if name in FORMAT_FILES or name in INT8_FILES}
    nothing: dict[str, Any] = {"serve": {}, "speedups": {}, "too_slow": {}, "verdicts": ()}
    for name, item in known.items():
        if isinstance(item, Mapping) and isinstance(item.get("speeds"), list) and len(item["speeds"]) > MOST_SPEEDS:
            raise ValueError(f"speed.measured.{name}.speeds: expected at most {MOST_SPEEDS:,}, got more")
    found = recall(MeasureResult, {**said, "measured": known, **nothing})
    if found is not None:
        _require_sound(found, "speed", least=0.0, most=LARGEST)
    return found


def told_samples(document: Mapping[str, Any]) -> int:
    """How many samples its metrics are of, by its `verdicts.json`; 0 where it does not say.

    Raises:
        ValueError: It is no number of samples.
    """
    found = document.get("validation_samples", 0)
    if type(found) is int and 0 <= found <= MOST_COUNT:
        return found
    raise ValueError(f"validation_samples: expected a whole number from 0, got {_shown(found)}")


def told_serve(serve: Mapping[str, str]) -> dict[str, str]:
    """What its manifest recommends, without purposes that nobody knows."""
    return {purpose: kind for purpose, kind in serve.items() if purpose in PURPOSES}


def _require_sound(
    value: Any, where: str, *, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> None:
    """Raises ValueError for a number or a text in a decoded dataclass that cannot be.

    Args:
        value: The dataclass, or something in it.
        where: Its path, for the message.
        least: Of numbers that are no counts.
        most: The same.
        whole: Whether its numbers are counts.
    """
    inside: Mapping[str, Any] = {}
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            # Annotations are texts here: `int | None`, `Sequence[int]`.
            counts, path = "int" in str(item.type), f"{where}.{item.name}" if where else item.name
            _require_sound(getattr(value, item.name), path, least=least, most=most, whole=counts)
        return
    if isinstance(value, Mapping):
        inside = value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inside = {str(place): item for place, item in enumerate(value)}
    for name, item in inside.items():
        if len(name) > LONGEST_NAME:
            raise ValueError(f"{where}: expected names of at most {LONGEST_NAME:,} characters, got {len(name):,}")
        _require_sound(item, f"{where}.{name}", least=least, most=most, whole=whole)
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{where}: expected at most {LONGEST_TEXT:,} characters, got {len(value):,}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if whole and not (isinstance(value, int) and 0 <= value <= MOST_COUNT):
        raise ValueError(f"{on_one_line(where, 200)}: expected a whole number from 0, got {_shown(value)}")
    finite = abs(value) <= MOST_COUNT if isinstance(value, int) else math.isfinite(value)
    if not whole and not (finite and least <= value <= most):
        between = f"from {least:g} to {most:g}" if most < math.inf else "that is finite"
        raise ValueError(f"{on_one_line(where, 200)}: expected a number {between}, got {_shown(value)}")


def _shown(value: Any) -> str:
    # Thousands of digits cannot be written, and need not be.
    if isinstance(value, int) and abs(value) > MOST_COUNT:
        return f"one of {value.bit_length():,} bits"
    return on_one_line(repr(value) if isinstance(value, int | float | None) else type(value).__name__, 80)

"""What is kept of a rollout's observations between two looks: sums per arm, step and slot of people. NumPy.

    statistics = Statistics(stop_if)
    statistics.add(rows, rollout=id, step=0, share=100)
    kept = json.dumps(statistics.document())

A slot is one of 10,000 into which request keys are hashed, and stands for its people: all that they send is one term of
the variance, however often they come back. Sums are added up, so parts that were counted apart can be merged.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.decision.limits import Limit, StopIf

SLOTS = 10_000
MOST_SEGMENTS = 8
"""Values of the column of `by` that are looked at, the last of them being all others together."""
OTHERS = "(others)"
LONGEST_SEGMENT = 64
MOST_STEPS = 100
FIELDS = ("request_id", "key_slot", "rollout", "arm", "latency_ms", "error", "fell_back", "inputs", "outputs")
"""Of a row that is an object; what else a mapping may have, `add` says."""
BIN = 1.02
"""Ratio of two neighboring latencies of the histogram: a quantile is known to 2 %."""
LEAST_MS, BINS = 0.01, 1024
EQUAL = 1e-3
"""Numbers of two answers that differ by no more than this part of the larger one agree."""
FORMAT = 1
_ARMS = ("candidate", "live")

Array = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """Whose sums an array holds."""

    measure: str
    """"requests", or the name of a limit."""
    segment: str
    """A value of the column of `by`; empty: all requests."""
    step: int
    arm: str
    """candidate or live."""


class Statistics:
    """Of one rollout. Every array is requests, sum and sum of squares by slot, shape (3, SLOTS), float64."""

    def __init__(self, stop_if: StopIf) -> None:
        self.stop_if = stop_if
        self.sums: dict[Cell, Array] = {}
        self.latencies = {arm: np.zeros(BINS, dtype=np.int64) for arm in _ARMS}
        """Histograms of all requests compared."""
        self.thresholds: dict[str, float] = {}
        """Limit on a latency to the milliseconds above which live's requests are counted: its quantile of live's first
        requests. Kept from then on, so that what is counted does not depend on what is found."""
        self.segments: list[str] = []
        self.apart: Counter[str] = Counter()
        """Rows that are not compared, by the reason."""
        self._is_part = False

    def like(self) -> Statistics:
        """Empty, with the same thresholds and segments, which it keeps: for a part of the rows, to be merged."""
        part = type(self)(self.stop_if)
        part._is_part = True
        part.thresholds, part.segments = dict(self.thresholds), list(self.segments)
        return part

    def merge(self, other: Statistics) -> None:
        """Adds what another one counted. Raises ValueError for one of other limits, thresholds or segments."""
        mine, theirs = ((item.stop_if, item.thresholds, item.segments) for item in (self, other))
        if mine != theirs:
            raise ValueError(f"expected statistics of the same limits, thresholds and segments: {mine}, got {theirs}")
        for cell, array in other.sums.items():
            self.sums[cell] = self.sums[cell] + array if cell in self.sums else array.copy()
        for arm, counts in other.latencies.items():
            self.latencies[arm] = self.latencies[arm] + counts
        self.apart.update(other.apart)
        self._fix_thresholds()

    def add(self, rows: Iterable[Any], *, rollout: str, step: int, share: int, shadow: bool = False) -> None:
        """Counts observations, each of them once; whoever calls remembers what was counted.

        A row is compared when its arm is what the split says of its slot: a reader that stays with live does so for
        reasons that have to do with the candidate, and requests without a key are never given to it. In shadow what is
        compared are pairs, two answers to one request that are among the same rows: what the candidate was not asked
        under load is missing from both arms. `metrics`, a mapping of a row, has the values that labels have told, by
        the limit's name; a row with `labelled: true` brings only those.

        Args:
            rows: As `observe` writes them, mappings or objects; what is not as it should be is counted apart.
            rollout: Its id; rows of others are not compared.
            step: Index of the step at which they were served; late ones may be given with that of their reading.
            share: Of that step, in hundredths of a percent.
            shadow: Whether live answers everybody, and the candidate on the side.
        """
        if not 0 <= step < MOST_STEPS:
            raise ValueError(f"expected a step of 0 to {MOST_STEPS - 1}, got {step}")
        kept = self._kept(rows, rollout, share, shadow)
        if not kept:
            return
        candidate = np.array([row["arm"] != "live" for row in kept])
        slots = np.array([row["key_slot"] for row in kept])
        segments = self._segments_of(kept)
        latencies = np.array([row["latency_ms"] for row in kept])
        measured = ~np.isnan(latencies)
        bins = np.clip(np.log(np.maximum(latencies, LEAST_MS) / LEAST_MS) / math.log(BIN), 0, BINS - 1)
        for arm, chosen in (("candidate", candidate), ("live", ~candidate)):
            chosen_bins = bins[chosen & measured].astype(np.int64)
            self.latencies[arm] += np.bincount(chosen_bins, minlength=BINS)
            cell = Cell(measure="requests", segment="", step=step, arm=arm)
            self._count(cell, slots, segments, np.where(chosen & ~_only_labels(kept), 1.0, np.nan))
            for limit in self.stop_if.limits:
                values = self._values(limit, kept, latencies, candidate)
                self._count(replace(cell, measure=limit.name), slots, segments, np.where(chosen, values, np.nan))
        self._fix_thresholds()

    def arrays(self, measure: str, segment: str = "") -> tuple[Array, Array]:
        """The candidate's and live's requests and sums of all steps, each of shape (steps, 2, SLOTS)."""
        steps = range(1 + max((cell.step for cell in self.sums), default=0))
        candidate, live = (
            np.stack([self._of(Cell(measure=measure, segment=segment, step=step, arm=arm))[:2] for step in steps])
            for arm in _ARMS
        )
        return candidate, live

    def spread(self, measure: str, segment: str = "") -> float:
        """Variance of single requests' values within the arms."""
        squares = requests = 0.0
        for cell, array in self.sums.items():
            if (cell.measure, cell.segment) == (measure, segment) and (n := array[0].sum()):
                squares += float(array[2].sum() - array[1].sum() ** 2 / n)
                requests += float(n)
        return max(0.0, squares / requests) if requests else 0.0

    def requests(self, arm: str, measure: str = "requests", *, segment: str = "", step: int | None = None) -> int:
        """How many were counted for a measure.

        Args:
            arm: candidate or live.
            measure: requests, or the name of a limit.
            segment: empty for all.
            step: None for all.
        """
        asked = (measure, segment, arm)
        return int(
            sum(
                array[0].sum()
                for cell, array in self.sums.items()
                if (cell.measure, cell.segment, cell.arm) == asked and step in (None, cell.step)
            )
        )

    def people(self, measure: str, segment: str = "") -> int:
        """Slots that sent a request to either arm: so many people there were at least."""
        candidate, live = self.arrays(measure, segment)
        return int(((candidate[:, 0] + live[:, 0]).sum(0) > 0).sum())

    def latency(self, arm: str, quantile: float) -> float:
        """Milliseconds, to 2 %; NaN without requests. arm: candidate or live."""
        counts = self.latencies[arm]
        if not counts.any():
            return math.nan
        place = int(np.searchsorted(np.cumsum(counts), quantile * counts.sum()))
        return float(LEAST_MS * BIN ** (place + 1))

    def document(self) -> dict[str, Any]:
        """As JSON, without a loss: some 10 kB for each step, arm and limit at hundreds of requests a slot."""
        return {
            "format": FORMAT,
            "stop_if": self.stop_if.document(),
            "thresholds": self.thresholds,
            "segments": self.segments,
            "apart": dict(self.apart),
            "latencies": {
                arm: {str(place): int(counts[place]) for place in np.flatnonzero(counts)}
                for arm, counts in self.latencies.items()
            },
            "sums": [
                {"measure": cell.measure, "segment": cell.segment, "step": cell.step, "arm": cell.arm} | _packed(array)
                for cell, array in sorted(self.sums.items())
            ],
        }

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """What `document` said. Raises ValueError for what is none, or of a later version."""
        if document.get("format") != FORMAT:
            raise ValueError(f"expected statistics of format {FORMAT}, got {document.get('format')!r}")
        try:
            found = cls(StopIf.parse(document["stop_if"]))
            found.thresholds = {str(name): float(value) for name, value in document["thresholds"].items()}
            found.segments = [str(name) for name in document["segments"]][:MOST_SEGMENTS]
            found.apart.update({str(name): int(count) for name, count in document["apart"].items()})
            for arm in _ARMS:
                for place, count in document["latencies"][arm].items():
                    found.latencies[arm][int(place)] = int(count)
            for item in document["sums"]:
                cell = Cell(**{name: item[name] for name in ("measure", "segment", "step", "arm")})
                if not 0 <= cell.step < MOST_STEPS or cell.arm not in _ARMS:
                    raise ValueError(f"step {cell.step} of {cell.arm}")
                found.sums[cell] = _unpacked(item)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, zlib.error) as error:
            raise ValueError(f"expected statistics of a rollout, got what is none ({error})") from None
        return found

    def _of(self, cell: Cell) -> Array:
        found = self.sums.get(cell)
        return np.zeros((3, SLOTS)) if found is None else found

    def _kept(self, rows: Iterable[Any], rollout: str, share: int, shadow: bool) -> list[Row]:
        """Rows that are compared, with values that are what they should be."""
        sound: list[Row] = []
        for given in rows:
            row = given if isinstance(given, Mapping) else {name: getattr(given, name, None) for name in FIELDS}
            slot, latency = row.get("key_slot"), row.get("latency_ms")
            if row.get("rollout") != rollout:
                self.apart["of another rollout, or of a reader that follows none"] += 1
            elif slot is None:
                self.apart["without a key"] += 1
            elif not _is_whole(slot) or not 0 <= slot < SLOTS or row.get("arm") not in ("live", "candidate", "shadow"):
                self.apart["malformed"] += 1
            else:
                measured = _is_number(latency) and 0 <= latency < 1e12  # type: ignore[operator]
                # Who answered in the candidate's place is live, and whose failure it was the candidate.
                arm = "candidate" if row.get("fell_back") and row["arm"] == "live" else row["arm"]
                found = {"arm": arm, "latency_ms": float(latency) if measured else math.nan}  # type: ignore[arg-type]
                sound.append({**row, **found})
        if shadow:
            kept = _pairs(sound)
            self._set_apart("in shadow, without the other answer", len(sound) - len(kept))
        else:
            arms = {"candidate": True, "live": False}
            kept = [row for row in sound if arms.get(row["arm"]) == (row["key_slot"] < share)]
            self._set_apart("answered by another arm than the split says", len(sound) - len(kept))
        return kept

    def _set_apart(self, reason: str, count: int) -> None:
        if count:
            self.apart[reason] += count

    def _segments_of(self, rows: list[Row]) -> NDArray[np.str_] | None:
        """Each row's value of the column of `by`, of which the most frequent of the first rows are told apart."""
        if not self.stop_if.by:
            return None
        found = [_segment(row, self.stop_if.by) for row in rows]
        if not self.segments and not self._is_part:
            self.segments = [name for name, _ in Counter(found).most_common(MOST_SEGMENTS - 1)] + [OTHERS]
        return np.array([name if name in self.segments else OTHERS for name in found])

    def _values(self, limit: Limit, rows: list[Row], latencies: Array, candidate: NDArray[np.bool_]) -> Array:
        """What a limit is about, by row; NaN where a row says nothing of it."""
        match limit.kind:
            case "errors":
                failed = [float(bool(row.get("error")) or bool(row.get("fell_back"))) for row in rows]
                return np.where(_only_labels(rows), np.nan, failed)
            case "latency":
                at = self.thresholds.get(limit.name)
                if at is None:
                    return np.full(len(rows), np.nan)
                slow = latencies > np.where(candidate, limit.times * at, at)
                return np.where(np.isnan(latencies), np.nan, slow.astype(float))
            case "disagreement":
                return np.array([row.get("disagrees", math.nan) for row in rows], dtype=float)
            case "metric":
                return np.array([_metric(row, limit.name) for row in rows])

    def _count(self, cell: Cell, slots: NDArray[np.int64], segments: NDArray[np.str_] | None, values: Array) -> None:
        chosen = ~np.isnan(values)
        for segment in ("", *(self.segments if segments is not None else ())):
            among = chosen if not segment else chosen & (segments == segment)
            if among.any():
                array = self.sums.setdefault(replace(cell, segment=segment), np.zeros((3, SLOTS)))
                for place, power in enumerate((np.ones(len(values)), values, values**2)):
                    array[place] += np.bincount(slots[among], weights=power[among], minlength=SLOTS)

    def _fix_thresholds(self) -> None:
        for limit in self.stop_if.limits:
            if limit.kind == "latency" and limit.name not in self.thresholds and not self._is_part:
                needed = max(200, 10 / (1 - limit.quantile))
                if self.latencies["live"].sum() >= needed:
                    self.thresholds[limit.name] = self.latency("live", limit.quantile)


def disagree(live: object, other: object) -> float:
    """1 where two answers differ in a value that both kept, 0 where they do not, NaN where there is none.

    Vectors are taken for scores of classes: they differ where their largest entries are at different places. Fractions
    differ by more than EQUAL of the larger one, everything else by not being equal.
    """
    if not isinstance(live, Mapping) or not isinstance(other, Mapping):
        return math.nan
    names = [name for name in live if live[name] is not None and other.get(name) is not None]
    return float(any(_differs(live[name], other[name]) for name in names)) if names else math.nan


def _differs(one: Any, two: Any) -> bool:
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two) > 0:
        if len(one) > 1 and all(_is_number(item) for item in (*one, *two)):
            return one.index(max(one)) != two.index(max(two))
        return any(_differs(*pair) for pair in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return not (math.isclose(one, two, rel_tol=EQUAL) or (math.isnan(one) and math.isnan(two)))
    return bool(one != two)


def _pairs(rows: list[Row]) -> list[Row]:
    """Both answers to each request that has two."""
    live = {str(row.get("request_id")): row for row in rows if row["arm"] == "live"}
    shadow = {str(row.get("request_id")): row for row in rows if row["arm"] == "shadow"}
    both = [(live[name], shadow[name]) for name in shadow if name in live]
    found = [(one, {**two, "disagrees": disagree(one.get("outputs"), two.get("outputs"))}) for one, two in both]
    return [row for pair in found for row in pair]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _only_labels(rows: list[Row]) -> NDArray[np.bool_]:
    return np.array([bool(row.get("labelled")) for row in rows])


def _metric(row: Mapping[str, Any], name: str) -> float:
    values = row.get("metrics")
    value = values.get(name) if isinstance(values, Mapping) else None
    return float(value) if _is_number(value) and abs(value) < 1e100 else math.nan  # type: ignore[arg-type]


def _segment(row: Mapping[str, Any], column: str) -> str:
    for side in ("inputs", "outputs"):
        values = row.get(side)
        value = values.get(column) if isinstance(values, Mapping) else None
        if isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63):
            return on_one_line(str(value), LONGEST_SEGMENT)
    return "(none)"


def _packed(array: Array) -> dict[str, str]:
    """In the smallest type that holds it exactly."""
    whole = bool((array == np.floor(array)).all() and (array >= 0).all() and array.max() < 2**32)
    kind = ("<u1" if array.max() < 2**8 else "<u2" if array.max() < 2**16 else "<u4") if whole else "<f8"
    return {"type": kind, "data": base64.b64encode(zlib.compress(array.astype(kind).tobytes())).decode()}


def _unpacked(item: Mapping[str, str]) -> Array:
    if item["type"] not in ("<u1", "<u2", "<u4", "<f8"):
        raise ValueError(f"numbers of type {item['type']!r}")
    raw = zlib.decompressobj().decompress(base64.b64decode(item["data"], validate=True), 3 * 8 * SLOTS)
    return np.frombuffer(raw, dtype=item["type"]).reshape(3, SLOTS).astype(np.float64)

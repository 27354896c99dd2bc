"""The data of a run in its report: what the checks found, and pictures of labels, columns and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train_and_ship.registry.data.checks import DRAWN, HEADER, SPLITS
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Chart, Mark, Section, Table, Text

BINS = 12
LEAST = 0.0005
"""Smallest population stability index that is drawn: below it the bars look the same."""
LABELS = 20
"""Most labels that are drawn: the most frequent ones."""
Facts = Mapping[str, Any]


def data_section(facts: Facts | None, checks: Facts | None) -> Section:
    """facts: InspectResult; checks: registry.data.checks.Report; both as plain values, None where nobody asked."""
    if facts is None:
        return Section(title="Data", blocks=())
    blocks: list[Block] = [_splits(facts)]
    passed: list[Block] = []
    if checks is not None:
        found, passed = _findings(checks)
        blocks += found
        blocks += _drift(checks) if checks["distributions"] else []
    blocks += _labels(facts)
    more = [*passed, *_columns(facts)]
    return Section(title="Data", blocks=blocks, more=more, more_title="Its columns, and what was checked")


def _splits(facts: Facts) -> Table:
    rows = [
        (split, f"{facts[split]['samples']:,}", f"{facts[split]['repeated']:,}", facts[split]["fingerprint"])
        for split in SPLITS
    ]
    return Table(header=("split", "samples", "repeated", "fingerprint"), rows=rows)


def _findings(checks: Facts) -> tuple[list[Block], list[Block]]:
    """What failed, and what passed; of drift, which is asked of every column, only how often it passed."""
    failed = [item for item in checks["findings"] if not item["passed"]]
    passed = [item for item in checks["findings"] if item["passed"]]
    told = [item for item in passed if item["check"] not in ("psi", "ks")]
    said = f"{len(passed)} of {len(checks['findings'])} checks passed, {len(passed) - len(told)} of them on drift."
    blocks: list[Block] = [Text(text=said)]
    if failed:
        blocks.append(_table(failed))
    return blocks, [_table(told)] if told else []


def _table(findings: Sequence[Any]) -> Table:
    rows = [
        (
            item["check"], item["where"], item["measured"], item["limit"],
            Mark(text="passed" if item["passed"] else "FAILED", good=item["passed"]),
        )
        for item in findings
    ]  # fmt: skip
    return Table(header=HEADER, rows=rows)


def _drift(checks: Facts) -> list[Block]:
    moved = [item for item in checks["distributions"] if item["psi"]["value"] >= LEAST]
    said = f"Beside the data of the live release {checks['live']}, " + (
        "what moved most first:" if moved else "nothing moved."
    )
    blocks: list[Block] = [Text(text=said)]
    for item in moved[:DRAWN]:
        bins = item["bins"]
        rows = list(zip(bins["names"], zip(bins["before"], bins["now"], strict=True), strict=True))
        distance = f", ks {item['ks']['value']:.3g}" if item["ks"] is not None else ""
        blocks.append(
            Chart(
                title=item["column"], note=f"psi {item['psi']['value']:.3g}{distance}",
                svg=charts.histogram(rows, ("live", "now"), _percent),
            )
        )  # fmt: skip
    if (left := len(moved) - DRAWN) > 0:
        blocks.append(Text(text=f"{left} more columns moved less."))
    return blocks


def _labels(facts: Facts) -> list[Block]:
    counts = [facts[split]["labels"] for split in SPLITS]
    if not all(counts):
        return []
    names = sorted({*counts[0], *counts[1]}, key=lambda name: -counts[0].get(name, 0))
    totals = [sum(labels.values()) for labels in counts]
    # In their own order, unless some are left out.
    chosen = sorted(names[:LABELS], key=_natural)
    rows = [
        (name, [labels.get(name, 0) / whole for labels, whole in zip(counts, totals, strict=True)]) for name in chosen
    ]
    note = f"the most frequent {LABELS} of {len(names)}" if len(names) > LABELS else ""
    return [Chart(title="Labels", note=note, svg=charts.histogram(rows, SPLITS, _percent))]


def _columns(facts: Facts) -> list[Block]:
    blocks: list[Block] = []
    held = facts["validation"]["columns"]
    for name, column in list(facts["train"]["columns"].items())[:DRAWN]:
        quantiles, other = column["quantiles"], held.get(name, {}).get("quantiles", ())
        if not quantiles:
            continue
        low, high = min([*quantiles, *other]), max([*quantiles, *other])
        bins = _histogram(quantiles, low, high)
        beside = _histogram(other, low, high) if other else [0.0] * len(bins)
        edges = [low + (high - low) * place / len(bins) for place in range(len(bins) + 1)]
        rows = [
            (
                f"{edges[place]:.3g} to {edges[place + 1]:.3g}" if low < high else f"{low:.3g}",
                [bins[place], beside[place]],
            )
            for place in range(len(bins))
        ]
        blocks.append(Chart(title=name, note="from percentiles", svg=charts.histogram(rows, SPLITS, _percent)))
    if (left := len(facts["train"]["columns"]) - DRAWN) > 0:
        blocks.append(Text(text=f"{left} more columns are in data.json of the release."))
    return blocks


def _histogram(quantiles: Sequence[float], low: float, high: float) -> list[float]:
    """Shares in bins of equal width, of values that percentiles stand for."""
    if low == high:
        return [1.0]
    counts = [0] * BINS
    for value in quantiles:
        counts[min(BINS - 1, int(BINS * (value - low) / (high - low)))] += 1
    return [count / len(quantiles) for count in counts]


def _natural(name: str) -> tuple[int, float, str]:
    return (0, float(name), "") if name.lstrip("-").isdigit() else (1, 0.0, name)


def _percent(share: float) -> str:
    return f"{share:.1%}"

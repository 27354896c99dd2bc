"""The data of a run in its report: what the checks found, and pictures of labels, columns and drift."""

from __future__ import annotations

from collections.abc import Sequence

from torchworker.contract import InspectResult
from train_and_ship.registry.data.checks import (
    DRAWN,
    LABELS,
    SPLITS,
    Distribution,
    Report,
    findings_table,
    groups_in_both,
    shared_samples,
)
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Chart, Page, Section, Text, markdown
from train_and_ship.registry.text import Table

BINS = 12
LEAST = 0.0005
"""Smallest population stability index that is drawn: below it the bars look the same."""
BAR = 24
"""Characters of a share of 1, where there are no pictures."""


def data_page(model: str, facts: InspectResult, checks: Report | None) -> str:
    """The data and its checks as markdown, for the person who looks before training."""
    return markdown(Page(title=f"Data of {model}", verdict="", good=True, sections=[data_section(facts, checks)]))


def data_section(facts: InspectResult | None, checks: Report | None) -> Section:
    """None where nobody asked."""
    if facts is None:
        return Section(title="Data", blocks=())
    splits = list(zip(SPLITS, (facts.train, facts.validation), strict=True))
    rows = [(name, f"{split.samples:,}", f"{split.repeated:,}", split.fingerprint) for name, split in splits]
    blocks: list[Block] = [Table(header=("split", "samples", "repeated", "fingerprint"), rows=rows)]
    more: list[Block] = []
    if shared := shared_samples(facts.overlap, facts.validation.samples):
        blocks.append(Text(text=f"{shared}."))
    if known := groups_in_both(facts):
        blocks.append(Text(text=f"{known}."))
    if checks is not None:
        passed = [item for item in checks.findings if item.passed]
        told = [item for item in passed if not item.drift]
        drift = len(passed) - len(told)
        blocks.append(Text(text=f"{len(passed)} of {len(checks.findings)} checks passed, {drift} of them on drift."))
        blocks += [findings_table(checks.failed)] if checks.failed else []
        blocks += _drift(checks) if checks.distributions else []
        more += [findings_table(told)] if told else []
    blocks += _labels(facts)
    return Section(
        title="Data", blocks=blocks, more=[*more, *_columns(facts)], more_title="Its columns, and what was checked"
    )


def _drift(checks: Report) -> list[Block]:
    moved = [item for item in checks.distributions if item.psi.value >= LEAST]
    said = f"Beside the data of the live release {checks.live}, " + (
        "what moved most first:" if moved else "nothing moved."
    )
    more = moved[DRAWN:]
    rest = f"{len(more)} more columns moved less: psi at most {more[0].psi.value:.3g}." if more else ""
    return [Text(text=said), *(_drawn(item) for item in moved[:DRAWN]), *([Text(text=rest)] if rest else [])]


def _drawn(item: Distribution) -> Chart:
    distance = f", ks {item.ks.value:.3g}" if item.ks is not None else ""
    bins = list(zip(item.bins.names, item.bins.before, item.bins.now, strict=True))
    rows = [(name, _percent(before), _percent(now), f"{_bar(before)} {_bar(now)}") for name, before, now in bins]
    return Chart(
        title=item.column,
        note=f"psi {item.psi.value:.3g}{distance}",
        svg=charts.histogram([(name, (before, now)) for name, before, now in bins], ("live", "now"), _percent),
        instead=Table(header=("values", "live", "now", "live, now"), rows=rows),
    )


def _bar(share: float) -> str:
    return ("█" * round(share * BAR)).ljust(BAR, "░")


def _labels(facts: InspectResult) -> list[Block]:
    counts = [facts.train.labels, facts.validation.labels]
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


def _columns(facts: InspectResult) -> list[Block]:
    blocks: list[Block] = []
    for name, column in list(facts.train.columns.items())[:DRAWN]:
        held_out = facts.validation.columns.get(name)
        quantiles, other = column.quantiles, held_out.quantiles if held_out else ()
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
    if (left := len(facts.train.columns) - DRAWN) > 0:
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

"""What a person needs when an artifact is not the model: which question, which element, where, and by how much."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from torchworker.contract import ErrorCounts, Mismatch
from train_and_ship.registry.report import charts
from train_and_ship.registry.text import Table, escaped, fenced

SHOWN = 5
"""Questions shown a format; the rest is counted."""


def parity_report(model: str, mismatches: Sequence[Mismatch], where: Mapping[str, str], histograms: str = "") -> str:
    """The report as markdown.

    Args:
        model: The model's name.
        mismatches: The worst of a format first.
        where: Format to the place at which it leaves the model, in words.
        histograms: Address of an image of how far all formats are from the model; empty for none.
    """
    sections = [
        f"# {model}: artifacts that are not the model",
        "Every format was asked the questions of docs/parity.md; these are the answers that differ by more than "
        "rounding explains. *× limit* is 1 where it would just pass; ∞ is not a matter of rounding.",
    ]
    if histograms:
        sections += [
            f"![How far every format is from the model, by kind of probe]({histograms})",
            "Each row is one format on one kind of probe. Bars are elements of its outputs by the size of their "
            "difference; their height is logarithmic. Red rows failed.",
        ]
    for kind in dict.fromkeys(item.format for item in mismatches):
        mine = [item for item in mismatches if item.format == kind]
        rows = [
            (item.probe, item.output or "–", "∞" if item.ratio == float("inf") else f"{item.ratio:.3g}", item.note)
            for item in mine[:SHOWN]
        ]
        sections.append(f"## {escaped(kind)}\n\n**Where:** {escaped(where.get(kind, 'not looked for'))}.")
        sections.append(Table(header=("question", "output", "× limit", "what"), rows=rows).markdown())
        if len(mine) > SHOWN:
            sections.append(f"And {len(mine) - SHOWN} more.")
        counted = next((item for item in mine if item.distribution), None)
        if counted is not None:
            what = escaped(f"Size of the differences, {counted.output} on {counted.probe}:")
            sections.append(f"{what}\n\n{fenced(chr(10).join(counted.distribution))}")
    return "\n\n".join(sections) + "\n"


def error_histograms(counts: Sequence[ErrorCounts]) -> str:
    """An SVG document: how far artifacts are from the model, a row for each format and kind of probe."""
    absolute = [(f"{item.format}: {item.probes}", item.absolute, item.failed) for item in counts]
    relative = [(f"{item.format}: {item.probes}", item.relative, item.failed) for item in counts]
    return charts.image({
        "|artifact − model|": charts.error_histogram(absolute),
        "|artifact − model| ÷ rms of the output": charts.error_histogram(relative),
    })  # fmt: skip


def embedded(svg: str) -> str:
    """The address of an image that is in the text itself, for pages that have no files beside them."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"

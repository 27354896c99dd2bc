"""What a person needs when an artifact is not the model: which question, which element, where, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from train_and_ship.registry.text import table

SHOWN = 5
"""Questions shown a format; the rest is counted."""


class Mismatch(Protocol):
    """One question on which an artifact is not the model."""

    @property
    def format(self) -> str: ...
    @property
    def probe(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def ratio(self) -> float:
        """How many times the limit."""

    @property
    def distribution(self) -> Sequence[str]: ...


def parity_report(model: str, mismatches: Sequence[Mismatch], where: Mapping[str, str], histograms: str = "") -> str:
    """Markdown. where: format to the place at which it leaves the model, in words; histograms: address of an image of
    how far all formats are from the model, empty for none."""
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
        sections.append(f"## {kind}\n\n**Where:** {where.get(kind, 'not looked for')}.")
        sections.append(table(("question", "output", "× limit", "what"), rows))
        if len(mine) > SHOWN:
            sections.append(f"And {len(mine) - SHOWN} more.")
        counted = next((item for item in mine if item.distribution), None)
        if counted is not None:
            bars = "\n".join(counted.distribution)
            sections.append(f"Size of the differences, {counted.output} on {counted.probe}:\n\n```text\n{bars}\n```")
    return "\n\n".join(sections) + "\n"

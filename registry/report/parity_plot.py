"""Histograms of how far artifacts are from the model: one row of bars for each format and kind of probe, as SVG."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Protocol

BAR, ROW, LABEL, GAP = 22, 34, 240, 40
"""Pixels: width of a bar, height of a row, width of the labels, space between the two histograms."""
GOOD, BAD, TEXT = "#4878a8", "#c8443c", "#808080"


class ErrorCounts(Protocol):
    """Elements of all outputs on one kind of probe, by how far they are from the model's."""

    @property
    def format(self) -> str: ...
    @property
    def probes(self) -> str: ...
    @property
    def failed(self) -> bool: ...
    @property
    def absolute(self) -> Sequence[int]:
        """Equal ones, those below the first decade, one number a decade, and those where one is not finite."""

    @property
    def relative(self) -> Sequence[int]:
        """The same for differences in units of the output's root mean square."""


def histograms(counts: Sequence[ErrorCounts], decades: Sequence[int]) -> str:
    """An SVG document. decades: powers of ten at which the bins begin.

    The height of a bar is the logarithm of its count; kinds of probes that failed are red.
    """
    bins = ["same", f"<1e{decades[0]}", *(f"1e{decade}" for decade in decades), "not finite"]
    half = BAR * len(bins)
    width, height = LABEL + 2 * half + GAP, 30 + ROW * len(counts) + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="{TEXT}">'
    ]
    for left, title in ((LABEL, "|artifact − model|"), (LABEL + half + GAP, "|artifact − model| ÷ rms of the output")):
        parts.append(f'<text x="{left}" y="16" font-size="13">{title}</text>')
        for place, name in enumerate(bins):
            x, y = left + BAR * place + BAR // 2 + 4, 30 + ROW * len(counts) + 8
            parts.append(
                f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-60 {x} {y})">{escape(name)}</text>'
            )
    for row, item in enumerate(counts):
        floor = 30 + ROW * (row + 1)
        color = BAD if item.failed else GOOD
        label = f"{item.format}: {item.probes}{' ✗' if item.failed else ''}"
        parts.append(f'<text x="{LABEL - 8}" y="{floor - 4}" text-anchor="end" fill="{color}">{escape(label)}</text>')
        for left, numbers in ((LABEL, item.absolute), (LABEL + half + GAP, item.relative)):
            parts.append(f'<path d="M{left} {floor}h{half}" stroke="{TEXT}" stroke-width="0.5"/>')
            most = math.log1p(max(numbers))
            for place, count in enumerate(numbers):
                if count:
                    tall = max(2, round((ROW - 6) * math.log1p(count) / most))
                    parts.append(
                        f'<rect x="{left + BAR * place + 2}" y="{floor - tall}" width="{BAR - 4}" height="{tall}" '
                        f'fill="{color}"><title>{escape(f"{label}, {bins[place]}: {count:,}")}</title></rect>'
                    )
    return "\n".join([*parts, "</svg>\n"])


def embedded(svg: str) -> str:
    """The address of an image that is in the text itself, for pages that have no files beside them."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"

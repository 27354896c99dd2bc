"""The month as a table in markdown and as a picture (SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from tests.support.month.history import Told
from tests.support.month.month import Lived
from train_and_ship.registry.channels.decisions import FAILED, KEPT, PROMOTED, SKIPPED

COLOURS = {PROMOTED: "#2e8b57", KEPT: "#d9902f", SKIPPED: "#b4bac2", FAILED: "#c8443c"}
MEANS = {
    PROMOTED: "promoted: shown to be better",
    KEPT: "kept: the candidate is not better",
    SKIPPED: "skipped: nothing new",
    FAILED: "failed: nothing went live",
}
LIVE = ("#4878a8", "#7fa6cc")
"""Of releases that follow each other."""
TEXT, GRID = "#30363d", "#e4e7eb"
LEFT, NIGHT, TOP, CHART, ROW = 76, 30, 132, 170, 22
"""Pixels: left margin, width of a night, top of the chart, its height, height of a row below it."""
REASON = 150
"""Characters of a reason in the table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One night, as it is shown."""

    number: int
    rows: int
    happens: str
    mark: str
    decisions: tuple[str, ...]
    why: str
    live: str
    accuracy: float | None
    seconds: float


def rows_of(lived: Sequence[Lived], told: Told, folder: Path) -> list[Row]:
    """What the record of decisions and `ship live --at` say of each night. Paths are told from `folder`."""
    return [
        Row(
            number=night.night.number,
            rows=night.rows,
            happens=night.night.happens,
            mark=night.night.mark,
            decisions=tuple(answer["decision"] for answer in told.answers.get(night.run, [])),
            why=str(told.last(night).get("why", "")).replace(f"{folder}/", ""),
            live=live,
            accuracy=night.accuracy,
            seconds=night.seconds,
        )
        for night, live in zip(lived, told.live, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| night | parcels | what happened | decision | why | live in the morning | accuracy | s |",
        f"|{'---|' * 8}",
    ]
    for row in rows:
        why = " ".join(row.why.split()).replace("|", "\\|")
        why = why if len(why) <= REASON else f"{why[:REASON]} …"
        accuracy = f"{row.accuracy:.3f}" if row.accuracy is not None else "–"
        decisions = ", then ".join(row.decisions)
        cells = (
            str(row.number), f"{row.rows:,}", row.happens, decisions, why, f"`{row.live[:8] or 'nothing'}`", accuracy,
            f"{row.seconds:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows: Sequence[Row]) -> str:
    """An SVG document: what happened above, the accuracy of what was live, each night's decision, what was live."""
    width, height = LEFT + NIGHT * len(rows) + 24, TOP + CHART + 4 * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="{TEXT}">',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="15" font-weight="bold">{len(rows)} nights of one model, unattended</text>',
        *_legend(),
        *_grid(len(rows)),
        *_accuracy(rows),
        *_marks(rows),
        *_decisions(rows),
        *_releases(rows),
    ]
    return "\n".join([*parts, "</svg>\n"])


def _x(place: int) -> float:
    return LEFT + NIGHT * (place + 0.5)


def _y(accuracy: float) -> float:
    """From 0.5 at the bottom to 1 at the top."""
    return TOP + CHART * (1 - (accuracy - 0.5) / 0.5)


def _text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {extra}>{escape(words)}</text>'


def _legend() -> list[str]:
    parts, x = [], 16.0
    for decision, means in MEANS.items():
        parts.append(f'<rect x="{x:g}" y="36" width="11" height="11" rx="2" fill="{COLOURS[decision]}"/>')
        parts.append(_text(x + 16, 45.5, means))
        x += 36 + 5.6 * len(means)
    return parts


def _grid(nights: int) -> list[str]:
    parts = []
    for tenths in range(5, 11):
        y = _y(tenths / 10)
        parts.append(f'<path d="M{LEFT} {y:g}h{NIGHT * nights}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tenths / 10:.1f}", 'text-anchor="end"'))
    middle = TOP + CHART / 2
    turned = f'text-anchor="middle" transform="rotate(-90 22 {middle:g})"'
    return [*parts, _text(22, middle, "accuracy of what is live", turned)]


def _accuracy(rows: Sequence[Row]) -> list[str]:
    path, dots, before = "", [], ""
    for place, row in enumerate(rows):
        if row.accuracy is None:
            continue
        y = _y(row.accuracy)
        path += f"{'L' if path else 'M'}{_x(place) - NIGHT / 2:g} {y:g}H{_x(place) + NIGHT / 2:g}"
        if row.live != before:
            dots.append(f'<circle cx="{_x(place):g}" cy="{y:g}" r="4.5" fill="{COLOURS[PROMOTED]}"/>')
            dots.append(
                _text(_x(place), y - 9, f"{row.accuracy:.3f}".lstrip("0"), 'text-anchor="middle" font-size="10"')
            )
        before = row.live
    return [f'<path d="{path}" fill="none" stroke="{LIVE[0]}" stroke-width="2"/>', *dots]


def _marks(rows: Sequence[Row]) -> list[str]:
    parts = []
    for place, row in enumerate(rows):
        if row.mark:
            x, y = _x(place), TOP - 8
            colour = COLOURS[row.decisions[0]] if row.decisions else TEXT
            parts.append(f'<path d="M{x:g} {TOP}V{TOP + CHART}" stroke="{colour}" stroke-dasharray="2 3"/>')
            parts.append(_text(x, y, row.mark, f'fill="{colour}" transform="rotate(-40 {x:g} {y:g})"'))
    return parts


def _decisions(rows: Sequence[Row]) -> list[str]:
    top = TOP + CHART + 10
    parts = [
        _text(LEFT - 8, top + 15, "decision", 'text-anchor="end"'),
        _text(LEFT - 8, top + 58, "night", 'text-anchor="end"'),
    ]
    for place, row in enumerate(rows):
        parts.append(_text(_x(place), top + 58, str(row.number), 'text-anchor="middle"'))
        # A run that died and was retried has two.
        share = (NIGHT - 4) / max(1, len(row.decisions))
        for part, decision in enumerate(row.decisions):
            x = LEFT + NIGHT * place + 2 + share * part
            parts.append(
                f'<rect x="{x:g}" y="{top}" width="{share - 1:g}" height="{ROW - 2}" rx="3" fill="{COLOURS[decision]}">'
                f"<title>{escape(f'night {row.number}, {row.happens}: {decision}, {row.why}')}</title></rect>"
            )
    return parts


def _releases(rows: Sequence[Row]) -> list[str]:
    """A band for as long as a release was live, with the beginning of its id where there is room."""
    y = TOP + CHART + 10 + ROW + 2
    parts, place = [_text(LEFT - 8, y + 14, "live", 'text-anchor="end"')], 0
    for number, (live, group) in enumerate(groupby(rows, key=lambda row: row.live)):
        nights = len(list(group))
        x, wide = LEFT + NIGHT * place + 1, NIGHT * nights - 2
        if live:
            parts.append(f'<rect x="{x:g}" y="{y}" width="{wide:g}" height="{ROW - 4}" fill="{LIVE[number % 2]}"/>')
            shown = live[: max(0, (wide - 4) // 7)][:8]
            middle = 'text-anchor="middle" fill="#ffffff" font-family="monospace" font-size="10"'
            parts.append(_text(x + wide / 2, y + 13, shown, middle))
        place += nights
    return parts

"""What a report is made of, whatever it is read in: sections of text, tables and charts. Plain values; no markup.

One page is rendered twice, as markdown for Prefect and as HTML (html.py). Everything in it may come from a user's
job or code, so whoever renders it escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from train_and_ship.registry.text import clean, table

NARROW = 50
"""Letters in a line of a phone, about."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Text that leads somewhere."""

    text: str
    url: str
    """http or https; any other one is shown as text."""

    @property
    def safe(self) -> bool:
        return re.match(r"https?://[^\s\"'<>]+$", self.url) is not None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A verdict in a cell: the word says it, the color helps."""

    text: str
    good: bool


Cell = str | Link | Mark


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Text whose lines are kept, in a fixed pitch."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns under a header; a table without one holds facts, a name and its value a row."""

    rows: Sequence[Sequence[Cell]]
    header: Sequence[str] = ()

    @property
    def narrow(self) -> bool:
        """Whether a phone has room for its columns; the first one may wrap."""
        cells = [self.header, *([cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        return sum([min(14, widths[0]), *widths[1:]]) + len(widths) <= NARROW


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with a caption."""

    title: str
    svg: str
    """An SVG element, made by registry/report/charts.py: the only markup that is not escaped."""
    note: str = ""


Block = Text | Lines | Table | Chart


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block]
    more: Sequence[Block] = ()
    """What is folded away until somebody asks: tables behind the charts."""
    more_title: str = "The numbers"

    @property
    def empty(self) -> bool:
        return not self.blocks and not self.more


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report."""

    title: str
    verdict: str
    """One word: promoted, kept, refused, failed, skipped …"""
    good: bool
    """Whether the verdict is one that nobody has to look after."""
    intro: str
    facts: Table
    sections: Sequence[Section] = field(default_factory=tuple)


_MARKDOWN = re.compile(r"([\\`*\[\]<>])")


def escaped(text: str) -> str:
    """Text that markdown leaves alone. Pipes are left to the table that it stands in."""
    return _MARKDOWN.sub(r"\\\1", text)


def markdown(page: Page) -> str:
    """The page as markdown, without its charts, whose numbers are in the tables."""
    parts = [f"# {escaped(page.title)}", escaped(page.intro), _table(page.facts)]
    for section in page.sections:
        shown = [_block(block) for block in (*section.blocks, *section.more)]
        parts.append("\n\n".join([f"## {escaped(section.title)}", *(text for text in shown if text)]))
    return clean("\n\n".join(part for part in parts if part) + "\n")


def _block(block: Block) -> str:
    match block:
        case Text():
            return escaped(block.text)
        case Lines():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            return f"{fence}text\n{block.text}\n{fence}"
        case Table():
            return _table(block)
        case Chart():
            return ""


def _table(found: Table) -> str:
    if not found.rows:
        return ""
    header = [escaped(name) for name in found.header] or ["what", "value"]
    return table(header, [[_cell(cell) for cell in row] for row in found.rows])


def _cell(cell: Cell) -> str:
    match cell:
        case Link():
            return f"[{escaped(cell.text)}](<{cell.url}>)" if cell.safe else escaped(cell.text)
        case Mark():
            return escaped(cell.text) if cell.good else f"**{escaped(cell.text)}**"
        case str():
            return escaped(cell)

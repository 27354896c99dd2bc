"""What a report is made of, whatever it is read in: sections of text, tables and charts. Plain values; no markup.

One page is rendered twice, as markdown for Prefect and as HTML (html.py). Everything in it may come from a user's
job or code, so whoever renders it escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from train_and_ship.registry.text import Table, clean, escaped, fenced


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Text whose lines are kept, in a fixed pitch."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with a caption."""

    title: str
    svg: str
    """An SVG element, made by registry/report/charts.py: the only markup that is not escaped."""
    note: str = ""
    instead: Table | None = None
    """What markdown shows in its place; None where a table of the page has its numbers."""


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
        """Whether it has nothing to say."""
        return not self.blocks and not self.more


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report."""

    title: str
    verdict: str
    """One word: promoted, kept, refused, failed, skipped …"""
    good: bool
    """Whether the verdict is one that nobody has to look after."""
    moved: bool = True
    """Whether something is live that was not before."""
    lead: str = ""
    """What went wrong, before anything else."""
    intro: str = ""
    facts: Table = field(default_factory=lambda: Table(rows=()))
    sections: Sequence[Section] = field(default_factory=tuple)


def markdown(page: Page) -> str:
    """The page as markdown: tables in the place of its charts."""
    parts = [f"# {escaped(page.title)}", escaped(page.lead), escaped(page.intro), page.facts.markdown()]
    for section in page.sections:
        shown = [_block(block) for block in (*section.blocks, *section.more)]
        parts.append("\n\n".join([f"## {escaped(section.title)}", *(text for text in shown if text)]))
    return clean("\n\n".join(part for part in parts if part) + "\n")


def _block(block: Block) -> str:
    match block:
        case Text():
            return escaped(block.text)
        case Lines():
            return fenced(block.text)
        case Table():
            return block.markdown()
        case Chart():
            if block.instead is None:
                return ""
            note = f": {block.note}" if block.note else ""
            return f"**{escaped(block.title)}**{escaped(note)}\n\n{block.instead.markdown()}"

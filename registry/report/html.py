"""A page as one HTML file: no script, no request to anywhere, readable on a phone. Jinja escapes all that is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train_and_ship.registry.report.page import Block, Chart, Lines, Page
from train_and_ship.registry.text import Link, Mark, Table, clean

TEMPLATE = "page.html.jinja"


def html(page: Page) -> str:
    """The whole document."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["grouped"] = _grouped
    environment.tests["link"] = lambda value: isinstance(value, Link)
    environment.tests["mark"] = lambda value: isinstance(value, Mark)
    return clean(environment.get_template(TEMPLATE).render(page=page))


def _grouped(blocks: Sequence[Block]) -> Iterator[tuple[str, Any]]:
    """Charts that follow each other stand side by side where there is room."""
    charts: list[Chart] = []
    for block in blocks:
        if isinstance(block, Chart):
            charts.append(block)
            continue
        if charts:
            yield "charts", charts
            charts = []
        kind = "table" if isinstance(block, Table) else "lines" if isinstance(block, Lines) else "text"
        if not (isinstance(block, Table) and not block.rows):
            yield kind, block
    if charts:
        yield "charts", charts

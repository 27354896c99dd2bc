"""Numbers, sizes and tables as people read them: plain text and markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def shorten(text: str, limit: int) -> str:
    """Cut `text` to at most `limit` characters, at the end of a line where there is one."""
    if len(text) <= limit:
        return text
    ending = "\n\n(shortened: the version's files hold the full report)\n"
    cut = text[: limit - len(ending)]
    return (cut.rpartition("\n")[0] or cut).rstrip() + ending


_NO_TEXT = re.compile("[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Text without what neither XML nor UTF-8 can hold: control characters, halves of surrogate pairs."""
    return _NO_TEXT.sub("\ufffd", text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    # MLflow's page leaves no room between columns; a no-break space does, also where the text is read raw.
    gap = "\u00a0" * 2
    body = [[cell(value) + gap for value in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (body[0], ["---"] * len(header), *body[1:]))


def number(value: float | None) -> str:
    """Four significant digits; whole numbers without a point."""
    if value is None:
        return "not measured"
    if float(value).is_integer() and abs(value) < 1e12:
        return str(int(value))
    return f"{value:.4g}"


def file_size(size: int) -> str:
    """Bytes in decimal units: `1.2 MB`."""
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def cell(text: str) -> str:
    """Text as a cell of a markdown table, which a pipe or a line break would end early."""
    return " ".join(text.replace("|", "\\|").split())


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(value.ljust(w) for value, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )

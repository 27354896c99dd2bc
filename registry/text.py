"""Numbers, sizes and tables as people read them. One table has three renderers: a terminal's, markdown's and HTML's.

The third is registry/report/html.py. What stands in a table may come from a user's job or code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from train_and_ship.infra.addresses import without_password

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
        """Whether it is a web address and nothing else."""
        return re.match(r"https?://[^\s\"'<>]+$", self.url) is not None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A verdict in a cell: the word says it, the color helps."""

    text: str
    good: bool


Cell = str | Link | Mark


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns under a header; a table without one holds facts, a name and its value a row."""

    rows: Sequence[Sequence[Cell]]
    header: Sequence[str] = ()
    notes: Sequence[str] = ()
    """What there is to say about single rows, a line each; it stands below."""

    @property
    def narrow(self) -> bool:
        """Whether a phone has room for its columns; the first one may wrap."""
        widths = [max(map(len, column)) for column in zip(*self._plain(), strict=True)]
        return sum([min(14, widths[0]), *widths[1:]]) + len(widths) <= NARROW

    def text(self) -> str:
        """Columns padded to their widest cell, for terminals and logs."""
        lines = self._plain()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join([*padded, *self.notes])

    def markdown(self) -> str:
        """For Prefect and MLflow; empty when it has no rows."""
        if not self.rows:
            return ""

        def shown(cell: Cell) -> str:
            match cell:
                case Link():
                    return f"[{escaped(cell.text)}](<{cell.url}>)" if cell.safe else escaped(cell.text)
                case Mark():
                    return escaped(cell.text) if cell.good else f"**{escaped(cell.text)}**"
                case str():
                    return escaped(cell)

        header = [escaped(name) for name in self.header] or ["what", "value"]
        # MLflow's page leaves no room between columns; a no-break space does, also where the text is read raw.
        gap = "\u00a0" * 2
        body = [header, *([shown(cell) for cell in row] for row in self.rows)]
        lines = ["| " + " | ".join(one_line(cell) + gap for cell in line) + " |" for line in body]
        lines.insert(1, "| " + " | ".join(["---"] * len(header)) + " |")
        notes = [f"- {one_line(escaped(note))}" for note in self.notes]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def _plain(self) -> list[list[str]]:
        cells = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows]
        return [list(self.header), *cells] if self.header else cells


_MARKUP = re.compile(
    # A place in a tensor, [3, 1], is no link, unless something behind it makes it one.
    r"(?P<place>\[[\d, ]*\](?=[^(\[:]))|"
    r"&(?=[#\w])|[`*~\[\]\\]"
    # A tag or an address in brackets; `<= 8` is neither.
    r"|<(?=[A-Za-z/?!$]|$)"
    # Emphasis, which within a word (vs_live) none is.
    r"|(?<![^\W_])_|_(?![^\W_])"
    # What pages make links of by themselves: addresses, e-mail, people.
    r"|(?<=\w):(?=//)|(?<=\bwww)\.|@(?=[\w-]+\.)|(?<!\w)@"
    # Headings, quotes, lists, rules and tables, at the beginning of a line; numbers such as -0.01 are none.
    r"|^[ \t]*(?:[#=|]|>(?!=)|[+-](?=\s|$)|-(?=-)|:(?=-)|\d{1,9}[.)](?=\s))",
    re.MULTILINE | re.IGNORECASE,
)


def escaped(text: str) -> str:
    """Text of others that markdown shows as it is: no tag, link, image, heading or emphasis of theirs is rendered.

    By character references, which Prefect's pages, MLflow's (showdown) and CommonMark all show as the character;
    backslashes are seen in MLflow. In code spans and fences they are not: see `fenced`. Pipes are left to the table
    that it stands in.
    """
    # Passwords first: written in another way, an address is not known for one. Markdown ends lines at carriage returns.
    text = without_password(text).replace("\r\n", "\n").replace("\r", "\n")
    return _MARKUP.sub(lambda found: found["place"] or "".join(map(_reference, found[0])), text)


def _reference(letter: str) -> str:
    return letter if letter in " \t" else f"&#{ord(letter)};"


def fenced(text: str) -> str:
    """Text of others whose lines are kept, in a fixed pitch, between fences that it cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def one_line(text: str) -> str:
    """Text as a cell of a markdown table, which a pipe or a line break would end early."""
    return " ".join(text.replace("|", "\\|").split())


def shorten(text: str, limit: int) -> str:
    """Cut `text` to at most `limit` characters, at the end of a line where there is one."""
    if len(text) <= limit:
        return text
    ending = "\n\n(shortened: the version's files hold the full report)\n"
    cut = text[: limit - len(ending)]
    return (cut.rpartition("\n")[0] or cut).rstrip() + ending


_NO_TEXT = re.compile("[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Text without passwords in addresses, and what neither XML nor UTF-8 can hold: control characters, half pairs."""
    return without_password(_NO_TEXT.sub("\ufffd", text))


def number(value: float | None) -> str:
    """Four significant digits; whole numbers without a point."""
    if value is None:
        return "not measured"
    if float(value).is_integer() and abs(value) < 1e12:
        return str(int(value))
    return f"{value:.4g}"


def file_size(size: int | None) -> str:
    """Bytes in decimal units: `1.2 MB`."""
    if size is None:
        return "not measured"
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def passed_or_failed(passed: bool) -> Mark:
    """A verdict as a cell."""
    return Mark(text="passed" if passed else "FAILED", good=passed)


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 5 s`, `1 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def money(price: float | None, currency: str) -> str:
    """With as many digits as it takes to tell it from nothing."""
    if price is None:
        return ""
    shown = f"{price:,.2f}" if price >= 1 or not price else f"{price:.2g}" if price >= 1e-4 else f"{price:.1e}"
    return f"{shown} {currency}".strip()


def interval_text(interval: tuple[float, float] | None) -> str:
    """Both ends with their signs; empty for None."""
    return "" if interval is None else f"{interval[0]:+.4g} to {interval[1]:+.4g}"

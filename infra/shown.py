"""Words of others as a terminal, a log or a table may show them: no control sequences, no lines that are not theirs.

Reasons, names and keys in the bucket are written by whoever has the right to. `ESC [` moves a cursor or renames a
window, a line break makes a second row of a table, and a right-to-left mark turns a line around.
"""

from __future__ import annotations

import re

LONGEST = 2000
"""Characters of one value on a line."""
LONGEST_MESSAGE = 100_000
"""Characters of a whole message."""

# Control characters but tab and line feed, line separators, marks that turn text around, and halves of surrogate pairs.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


_HALVES = re.compile("[\ud800-\udfff]")


def whole(text: str, escape: str = "\\") -> str:
    """The text with halves of surrogate pairs made visible, as nothing else can be encoded.

    escape: what stands before `ud800`; `\\\\` within JSON.
    """
    return _HALVES.sub(lambda half: f"{escape}u{ord(half[0]):04x}", text)


def harmless(text: str) -> str:
    """The text with what steers a terminal made visible (`\\x1b`); tabs and line feeds stay. Cut when it is huge."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]}… ({len(text):,} characters)"
    # `\r\n` is how some systems end a line.
    return _COMMANDS.sub(_visible, text.replace("\r\n", "\n"))


def on_one_line(text: str, longest: int = LONGEST) -> str:
    """As `harmless`, on one line, cut to `longest` characters: a value among others."""
    line = harmless(" ".join(text[: 4 * longest].split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

"""Lines of code of each Python file, without docstrings, comments and blank lines.

    python -m tests.support.code_lines [FOLDER …]      # the longest files, then the packages of the product

A line counts when a token of code stands on it. Strings that stand alone as statements (docstrings, and the sentences
under fields) do not count.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

PRODUCT = ("flows", "tasks", "registry", "infra", "ship", "api", "torchworker", "shipreader")
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> int:
    """The number of lines of a module's text on which code stands."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            silent.update(range(node.lineno, node.end_lineno + 1))
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            counted.update(range(token.start[0], token.end[0] + 1))
    return len(counted - silent)


def count(folders: Iterable[Path]) -> dict[Path, int]:
    """Every Python file below the folders to its lines of code."""
    return {path: code_lines(path.read_text()) for folder in folders for path in sorted(folder.rglob("*.py"))}


def main() -> None:
    found = count(Path(name) for name in (sys.argv[1:] or PRODUCT))
    totals: dict[str, int] = {}
    for path, lines in found.items():
        totals[path.parts[0]] = totals.get(path.parts[0], 0) + lines
    for path, lines in sorted(found.items(), key=lambda item: -item[1])[:10]:
        print(f"{lines:6}  {path}")
    print("\n".join(f"{lines:6}  {name}/" for name, lines in totals.items()))
    print(f"{sum(totals.values()):6}  in {len(found)} files")


if __name__ == "__main__":
    main()

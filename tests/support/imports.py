"""What the Python files of this repository import, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.projects import REPOSITORY


def modules(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file below a folder of the repository: its path from there, and what it says."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, wherever the statement stands, except for type checking alone."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.expr):
            # No expression holds a statement.
            left += ast.iter_child_nodes(node)

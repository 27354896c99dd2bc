"""One-line faults in the product, as mutation testing seeds them: drawn by chance, put in and taken out again."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One statement of one module, and what stands there instead."""

    module: str
    """Path below the repository."""
    line: int
    """Where it stood when it was drawn, for people; `put` looks for the text."""
    kind: str
    was: str
    """Whole lines."""
    becomes: str

    def put(self, root: Path) -> str:
        """Write it into a checkout; returns the text of before, to write back.

        Raises ValueError when the lines are not there once, at the line they were or nearest to it.
        """
        path = root / self.module
        text = path.read_text()
        lines, old = text.splitlines(keepends=True), self.was.splitlines(keepends=True)
        places = [at for at in range(len(lines)) if lines[at : at + len(old)] == old]
        if not places:
            raise ValueError(f"{self.module} has changed since the fault was drawn; not found:\n{self.was}")
        at = min(places, key=lambda place: abs(place + 1 - self.line))
        path.write_text("".join([*lines[:at], self.becomes, *lines[at + len(old) :]]))
        return text


def draw(module: str, text: str, chance: random.Random) -> Fault | None:
    """A fault of a module; None where nothing of it can be wrong in one line. Each kind is as likely as the others."""
    found: dict[str, list[tuple[ast.AST, str]]] = {}
    for kind, node, becomes in _candidates(ast.parse(text), text):
        found.setdefault(kind, []).append((node, becomes))
    if not found:
        return None
    kind = chance.choice(sorted(found))
    node, becomes = chance.choice(found[kind])
    lines = text.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    was = "".join(lines[first : last + 1])
    start = len(lines[first].encode()[: node.col_offset].decode())  # type: ignore[attr-defined]
    end = len(lines[last].encode()[: node.end_col_offset].decode())  # type: ignore[attr-defined]
    return Fault(
        module=module,
        line=node.lineno,  # type: ignore[attr-defined]
        kind=kind,
        was=was,
        becomes=lines[first][:start] + becomes + lines[last][end:],
    )


def _candidates(tree: ast.Module, text: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Kind, node and the text that takes its place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While) and not _typing(node.test):
            if node.test.lineno == node.test.end_lineno:
                yield "negated condition", node.test, f"(not ({ast.get_source_segment(text, node.test)}))"
        elif isinstance(node, ast.Raise):
            yield "dropped raise", node, "pass"
        elif isinstance(node, ast.Call) and len(node.args) >= 2 and node.lineno == node.end_lineno:
            first, second = node.args[:2]
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield "swapped arguments", node, _swapped(text, node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if len(body) > 1:
                yield "early return", body[0], "return None"
        elif isinstance(node, ast.Constant) and node.lineno == node.end_lineno:
            if isinstance(node.value, bool):
                yield "swapped constant", node, str(not node.value)
            elif isinstance(node.value, int | float):
                yield "swapped constant", node, str(node.value + 1)


def _typing(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def _swapped(text: str, call: ast.Call) -> str:
    """The call with its first two arguments the other way round."""
    whole, first, second = (ast.get_source_segment(text, node) or "" for node in (call, *call.args[:2]))
    # On one line, so columns are all that counts.
    origin = call.col_offset
    raw = whole.encode()
    one, two = call.args[0], call.args[1]
    head, between = raw[: one.col_offset - origin], raw[one.end_col_offset - origin : two.col_offset - origin]  # type: ignore[operator]
    tail = raw[two.end_col_offset - origin :]  # type: ignore[operator]
    return (head + second.encode() + between + first.encode() + tail).decode()

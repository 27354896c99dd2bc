"""Each message that docs/troubleshooting.md explains is one that the sources say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.imports import modules
from tests.support.projects import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
PACKAGES = ("infra", "tasks", "registry", "ship", "torchworker", "shipreader")


@cache
def sentences() -> str:
    """A line for each text of the sources; dots stand for what is filled in."""
    return "\n".join(
        text.replace("\n", " ") for package in PACKAGES for _, tree in modules(package) for text in _texts(tree)
    )


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("%s", "…")


def test_there_are_messages_each_with_what_to_do() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) > 25
    for part in re.split(r"^### .*$", PAGE, flags=re.MULTILINE)[1:]:
        assert len(part.partition("\n## ")[0].split()) > 5


@pytest.mark.parametrize("message", MESSAGES)
def test_the_sources_say_it(message: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    assert re.search("[^\n]*".join(pieces), sentences()), message

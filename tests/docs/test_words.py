"""The house speaks the words of docs/glossary.md: names in code, and sentences that people read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.import_graph import FOLDERS
from tests.support.imports import modules
from tests.support.projects import REPOSITORY

GLOSSARY = (REPOSITORY / "docs" / "glossary.md").read_text()
# What a thing was called before it had the field's name.
NAMES = re.compile(
    r"_?(Night|Nights|night|Apart|apart|Begun|Note|Died|Hung|side_by_side|_?Court|Trial|Told|Beside|Spread|Standing|"
    r"WorkerHost|worker_host|alone|tell|tell_mlflow|told|standing|mirror|mirror_all|references|freshness|observation|"
    r"rebuild|views|UserMistake)"
)
SENTENCES = re.compile(r"\b(nights?|on trial|worker host)\b", re.IGNORECASE)
NIGHTS = re.compile(
    r"(every|each|at|by|for a|once a|thirty|bad)\s+nights?(\s+by\s+night)?|night by night", re.IGNORECASE
)
"""The time of day, not a run."""
MONTH = "month.md"
"""The story of thirty nights."""


def test_every_place_in_the_glossary_is_there() -> None:
    places = [place for place in re.findall(r"`([a-z_]+/[\w/.]*)`", GLOSSARY)]
    assert len(places) > 30
    for place in places:
        assert (REPOSITORY / place).exists(), place


def test_words_of_the_glossary_stand_once() -> None:
    words = re.findall(r"^\| ([^|]+) \|", GLOSSARY, re.MULTILINE)[2:]
    assert len(words) == len(set(words)) > 40


@pytest.mark.parametrize("package", FOLDERS)
def test_names_in_code_are_the_fields(package: str) -> None:
    for file, tree in modules(package):
        stem = file.rpartition("/")[2].removesuffix(".py")
        for name in (stem, *defined(tree)):
            assert NAMES.fullmatch(name) is None, f"{file}: {name}; docs/glossary.md has the word"


def test_names_of_exceptions_end_in_error() -> None:
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for package in FOLDERS
        for _, tree in modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    raised = {"Exception", "BaseException"}
    while more := {name for name, above in bases.items() if name not in raised and (above & raised or _builtin(above))}:
        raised |= more
    ours = raised & bases.keys()
    assert len(ours) > 15
    assert [name for name in sorted(ours) if not name.endswith("Error")] == []


def _builtin(names: set[str]) -> bool:
    return any(name.endswith("Error") for name in names)


@pytest.mark.parametrize("package", FOLDERS)
def test_sentences_for_people_use_the_fields_words(package: str) -> None:
    for file, tree in modules(package):
        for line, text in sentences(tree):
            found = SENTENCES.search(NIGHTS.sub("", text))
            assert found is None, f"{file}:{line} says {found[0]!r}"


def test_pages_use_the_fields_words() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    for page in pages:
        if page.name != MONTH:
            found = SENTENCES.search(NIGHTS.sub("", page.read_text()))
            assert found is None, f"{page.name} says {found[0]!r}"


def defined(tree: ast.Module) -> Iterator[str]:
    """Names of the classes and functions of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


def sentences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the strings of a file, docstrings among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value

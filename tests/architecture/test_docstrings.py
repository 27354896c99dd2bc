"""What a public name says about itself: a sentence, and a list of its arguments where their order or shape matters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.projects import REPOSITORY


@dataclass(frozen=True)
class Rule:
    """What is asked of a package. A change towards less is a change of the design."""

    sentences: bool = True
    """Every public module, class, function, method and property has a docstring."""
    arguments: int | None = None
    """From so many parameters on, or from two that hold tensors, a public function has a block `Args:`."""


RULES = {
    "flows": Rule(),
    "tasks": Rule(arguments=4),
    "registry": Rule(arguments=4),
    "infra": Rule(arguments=4),
    "torchworker": Rule(arguments=4),
    # The arguments of commands are explained to those who type them.
    "ship": Rule(sentences=False),
    "api": Rule(arguments=4),
    "shipreader": Rule(arguments=4),
}
"""Packages that keep a rule."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(package: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    """Everything public with the place where it is; constructors too, which need no sentence of their own."""
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        if path.name != "__init__.py":
            file, module = path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())
            yield file, module
            yield from ((f"{file}:{node.lineno} {name}", node) for name, node in below(module))


def below(node: ast.Module | ast.ClassDef, inside: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    for item in node.body:
        if isinstance(item, ast.ClassDef) and not item.name.startswith("_"):
            yield f"{inside}{item.name}", item
            yield from below(item, f"{inside}{item.name}.")
        elif isinstance(item, Function) and (not item.name.startswith("_") or item.name == "__init__"):
            yield f"{inside}{item.name}", item


def parameters(function: Function) -> list[ast.arg]:
    given = function.args
    return [item for item in (*given.posonlyargs, *given.args, *given.kwonlyargs) if item.arg not in ("self", "cls")]


def holds_tensors(parameter: ast.arg) -> bool:
    names = {node.id for node in ast.walk(parameter) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(parameter) if isinstance(node, ast.Attribute)}
    return bool(names & {"Tensor", "Inputs"})


@pytest.mark.parametrize("package", [name for name, rule in RULES.items() if rule.sentences])
def test_everything_public_says_what_it_is(package: str) -> None:
    silent = [
        place
        for place, node in public(package)
        if not ast.get_docstring(node) and not (isinstance(node, Function) and node.name == "__init__")
    ]
    assert silent == []


@pytest.mark.parametrize("package", [name for name, rule in RULES.items() if rule.arguments is not None])
def test_functions_of_several_or_of_tensors_list_their_arguments(package: str) -> None:
    most = RULES[package].arguments
    assert most is not None
    found = {place: node for place, node in public(package) if isinstance(node, Function)}
    owing = [
        place
        for place, node in found.items()
        if len(parameters(node)) >= most or sum(map(holds_tensors, parameters(node))) >= 2
    ]
    assert owing, "the rule looks at something"
    # `As another_name` sends the reader to a function that lists them.
    said = {place: ast.get_docstring(found[place]) or "" for place in owing}
    assert [place for place, text in said.items() if "Args:" not in text and not text.startswith("As `")] == []

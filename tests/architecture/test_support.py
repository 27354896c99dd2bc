"""Helpers are in tests/support and nowhere else, and whatever uses them uses only these."""

from __future__ import annotations

import ast
import re
from pathlib import PurePath

import pytest

from tests.support.imports import imports, modules
from tests.support.projects import REPOSITORY

SUPPORT = "tests/support/"
FIXTURES = "tests/fixtures/"
"""Files that were made once and are read; no test imports them."""
OTHERS = re.compile(r"(?:from|import) +tests(?:\.(?!support\b)\w+| +import +(?!support\b))")
"""As code for other processes says it, in a string."""


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def decorators(function: ast.FunctionDef) -> set[str]:
    called = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return {ast.unparse(node) for node in called}


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_of_the_tests_only_support_is_imported(folder: str) -> None:
    for file, tree in modules(folder):
        for name in imports(tree):
            if is_of(name, "tests") and name != "tests":
                assert is_of(name, "tests.support"), f"{file} imports {name}"
        found = OTHERS.search((REPOSITORY / file).read_text())
        assert found is None, f"{file} says {found[0]}"
        near = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not near, f"{file} imports by its own place"


def test_support_imports_no_benchmark() -> None:
    for file, tree in modules(SUPPORT):
        assert not [name for name in imports(tree) if is_of(name, "benchmarks")], file


def test_helpers_are_in_support_and_tests_are_not() -> None:
    for file, _ in modules("tests"):
        if file.startswith(FIXTURES):
            continue
        name = PurePath(file).name
        is_test = name.startswith("test_") or name == "conftest.py"
        if file.startswith(SUPPORT):
            assert not is_test, file
        else:
            assert is_test or name in ("__init__.py", "__main__.py"), file


def test_each_helper_says_in_one_line_what_it_holds() -> None:
    for file, tree in modules(SUPPORT):
        first, *_ = (ast.get_docstring(tree) or "").splitlines() or [""]
        assert first.endswith((".", ":")), file


def test_a_conftest_holds_fixtures_and_hooks() -> None:
    for file, tree in modules("tests"):
        if PurePath(file).name != "conftest.py":
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                assert "pytest.fixture" in decorators(node) or node.name.startswith("pytest_"), f"{file}: {node.name}"
            else:
                # The docstring is an expression.
                assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr), f"{file}: {ast.unparse(node)}"


def test_benchmarks_use_no_private_name() -> None:
    for file, tree in modules("benchmarks"):
        names = [part for name in imports(tree) for part in name.split(".")]
        names += [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls")
        ]
        private = [name for name in names if name.startswith("_") and not name.endswith("__")]
        assert not private, f"{file} uses {private}"

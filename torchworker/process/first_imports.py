"""Which installed packages the project's modules import before anything of theirs runs. Reads sources, runs nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHARED = frozenset(["numpy", "pandas", "PIL", "scipy", "sklearn"])
"""Packages that are slow to import, and may be imported once for all processes: they know nothing of torch, so that no
artifact loads in the clean room because of them, they start no threads that a fork would miss (OpenBLAS looks after its
own), and they touch no GPU."""


def first_imports(request: Mapping[str, Any]) -> list[str]:
    """Modules of SHARED that a stage's project imports at the heads of its files, in that order.

    A head ends with the first statement that is no import: what that sets, such as a variable of the environment, may
    be meant for the next import.

    Args:
        request: a stage's, as plain JSON.
    """
    project = request.get("project")
    if not isinstance(project, dict):
        return []
    seen: set[str] = set()
    targets = [part["target"] for part in [*project.values(), *_parts(request)] if _is_reference(part)]
    found = [name for target in targets for name in _imports(target.partition(":")[0], Path(project["folder"]), seen)]
    return list(dict.fromkeys(found))


def forget_hidden(request: Mapping[str, Any]) -> None:
    """Let a project import its own module where it hides one of SHARED that was imported for another project."""
    own = hidden(request, SHARED)
    for module in list(sys.modules):
        if module.partition(".")[0] in own:
            del sys.modules[module]


def hidden(request: Mapping[str, Any], packages: Iterable[str]) -> list[str]:
    """Those packages for which a stage's project has a module of its own, which its code is to get."""
    project = request.get("project")
    return [name for name in packages if isinstance(project, dict) and _file(name, Path(project["folder"]))]


def _is_reference(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("target"), str)


def _parts(request: Mapping[str, Any]) -> Iterator[object]:
    train = request.get("train")
    entrypoint = train.get("entrypoint") if isinstance(train, dict) else None
    if isinstance(entrypoint, dict):
        yield entrypoint.get("function")


def _imports(module: str, folder: Path, seen: set[str]) -> Iterator[str]:
    """Of a module of the project and of what it imports there; nothing of one that is not there."""
    path = _file(module, folder)
    if path is None or module in seen:
        return
    seen.add(module)
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        # Whoever imports it says so.
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for statement in body:
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            source = _absolute(statement, package)
            names = [source, *(f"{source}.{alias.name}" for alias in statement.names if _file(source, folder))]
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        else:
            return
        for name in names:
            top = name.partition(".")[0]
            if _file(top, folder) is not None:
                for parent in _parents(name):
                    yield from _imports(parent, folder, seen)
            elif top in SHARED:
                yield name
            elif top != "torch" and top not in sys.stdlib_module_names:
                # What it does to the next one is not known.
                return


def _parents(module: str) -> Iterator[str]:
    """What an import of a module runs, in order: a, a.b, a.b.c."""
    parts = module.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    parts = package.split(".") if package else []
    above = parts[: len(parts) - statement.level + 1] if statement.level else []
    return ".".join([*above, *([statement.module] if statement.module else [])])


def _file(module: str, folder: Path) -> Path | None:
    """Of a module of the project."""
    path = folder.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in files if module and file.is_file()), None)

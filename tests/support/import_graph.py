"""Who imports whom among our own modules, from their import statements: files, rooms, arrows and floors.

    python -m tests.support.import_graph [FOLDER]      # counts of the product, or of a checkout somewhere else

An arrow leads from a file to a file that it imports, wherever the statement stands, type checking aside. The floor of a
file is the longest way down from it: 1 for one that imports nothing of its package. A circle has no floors: an error.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.imports import imports
from tests.support.projects import REPOSITORY

FOLDERS = {
    "flows": "train_and_ship.flows",
    "tasks": "train_and_ship.tasks",
    "registry": "train_and_ship.registry",
    "infra": "train_and_ship.infra",
    "ship": "train_and_ship.ship",
    "api": "train_and_ship.api",
    "torchworker": "torchworker",
    "shipreader": "shipreader",
}
"""Folder of the product to the name that its code is imported by."""
Graph = Mapping[str, set[str]]
"""Path of a file, below the root, to the paths of the files that it imports."""


def module_name(file: str) -> str:
    """The name that a file of the product is imported by, such as `train_and_ship.registry.job.load`."""
    folder, _, rest = file.removesuffix(".py").removesuffix("/__init__").partition("/")
    return ".".join([FOLDERS[folder], *rest.split("/")] if rest else [FOLDERS[folder]])


def files_of(root: Path = REPOSITORY) -> dict[str, Path]:
    """The files of the product by their paths below the root, without empty `__init__.py` files."""
    return {
        path.relative_to(root).as_posix(): path
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        if path.name != "__init__.py" or path.read_text().strip()
    }


def graph(root: Path = REPOSITORY) -> Graph:
    """The files of the product and what each imports of it."""
    files = files_of(root)
    # Also by the folder's own name: so a checkout from before the packages had one can be counted as well.
    names = {module_name(file): file for file in files}
    names |= {file.removesuffix(".py").replace("/", "."): file for file in files}
    return {
        file: {names[name] for name in imports(ast.parse(path.read_text())) if name in names} - {file}
        for file, path in files.items()
    }


def inside(whole: Graph, folder: str) -> Graph:
    """The part of a graph whose files lie below a folder."""
    below = {file for file in whole if file.startswith(folder + "/")}
    return {file: whole[file] & below for file in sorted(below)}


def rooms(whole: Graph, folder: str) -> Graph:
    """A package by room: a folder inside it, or a file that stands beside the folders."""
    found: dict[str, set[str]] = {}
    for file, imported in inside(whole, folder).items():
        found.setdefault(_room(file), set()).update(map(_room, imported))
    return {room: others - {room} for room, others in found.items()}


def _room(file: str) -> str:
    return file.split("/")[1].removesuffix(".py")


def floors(part: Graph) -> dict[str, int]:
    """Each node to its floor, the lowest first. Raises graphlib.CycleError, which names the nodes of a circle."""
    found: dict[str, int] = {}
    for node in graphlib.TopologicalSorter(part).static_order():
        found[node] = 1 + max((found[other] for other in part[node]), default=0)
    return found


def main() -> None:
    whole = graph(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY)
    print(f"{'package':12} {'files':>5} {'arrows':>6} {'floors':>6}    rooms: number, arrows, floors")
    for folder in FOLDERS:
        part, by_room = inside(whole, folder), rooms(whole, folder)
        print(
            f"{folder:12} {len(part):5} {_arrows(part):6} {max(floors(part).values()):6}    "
            f"{len(by_room)}, {_arrows(by_room)}, {max(floors(by_room).values())}"
        )


def _arrows(part: Graph) -> int:
    return sum(len(imported) for imported in part.values())


if __name__ == "__main__":
    main()

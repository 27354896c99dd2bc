"""What in a repository may be the model and the dataset of a job, by reading its sources: nothing of it is imported."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from train_and_ship.infra.provenance import source_files

MOST_FILES = 5_000
LARGEST = 1_000_000
"""Bytes of a source file; larger ones are generated."""
_NOT_LOOKED_AT = frozenset(["tests", "test", "docs", "build", "dist"])
_FRAMEWORK_MODULES = ("LightningModule", "PreTrainedModel")
_WRAPPED = frozenset(["model", "module", "net", "network", "backbone", "encoder"])
"""First argument of what is built around a model."""
_MODEL_NAME = re.compile(r"(build|make|create|get)_(model|net|network)")
_LOSSES = {
    "CrossEntropyLoss": "cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A class or function at the top level of a module."""

    reference: str
    """`module:name`, as job files have it."""
    root: str
    """The folder that has to be on the import path, relative to the repository: `src`, or a dot."""
    place: str
    """`file:line`."""
    needs: tuple[str, ...]
    """Parameters without a default, besides `split` of a dataset."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the sources say."""

    models: list[Candidate]
    """What makes a torch.nn.Module and is no part of another."""
    datasets: list[Candidate]
    """What can be called with `split`."""
    without_split: list[Candidate]
    """Datasets that cannot."""
    loss: str | None
    """The only loss of torch that is named, as job files call it."""
    names: Mapping[str, frozenset[str]]
    """Module to all that has a name at its top level."""
    known: Mapping[str, Candidate]
    """Every class and function at a top level, by reference."""
    notebooks: list[str]
    """Relative to the folder."""
    unreadable: list[str]
    """Files that are no Python that this interpreter can parse, with the reason."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A class or function, with names in full: `package.module.name`."""

    full: str
    candidate: Candidate
    parameters: frozenset[str]
    first: str
    """The first parameter without a default; empty without one."""
    bases: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    """The annotation, and what is called in return statements."""
    calls: frozenset[str] = frozenset()
    is_class: bool


@dataclass
class _Sources:
    items: dict[str, _Item] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    """`package.name` to what an import there calls so: a package hands on what its modules define."""
    names: dict[str, frozenset[str]] = field(default_factory=dict)
    losses: set[str] = field(default_factory=set)


def find_candidates(folder: Path) -> Found:
    """Read every Python file below the folder, but for tests, hidden folders and virtual environments.

    Raises OSError for a folder that cannot be read.
    """
    # Else a folder without the right to read looks like an empty one.
    next(folder.iterdir(), None)
    sources, unreadable = _Sources(), []
    for path in _python_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            tree = _parsed(path)
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            unreadable.append(f"{name}: {getattr(error, 'msg', None) or error or type(error).__name__}")
            continue
        _Module(path, folder).collect(tree, sources)
    models, datasets, without_split = _sorted_out(_resolved(sources))
    (loss,) = sources.losses if len(sources.losses) == 1 else (None,)
    return Found(
        models=models,
        datasets=datasets,
        without_split=without_split,
        loss=loss,
        names=sources.names,
        known={item.candidate.reference: item.candidate for item in sources.items.values()},
        notebooks=sorted(path.relative_to(folder).as_posix() for path in _notebooks(folder)),
        unreadable=unreadable,
    )


def _python_files(folder: Path) -> Iterator[Path]:
    found = 0
    for path in source_files(folder):
        parts = path.relative_to(folder).parts
        is_test = _NOT_LOOKED_AT & {*parts[:-1]} or parts[-1].startswith(("test_", "conftest", "setup."))
        importable = all(part.isidentifier() for part in (*parts[:-1], path.stem))
        if path.suffix == ".py" and importable and not is_test and path.is_file():
            found += 1
            if found > MOST_FILES:
                return
            yield path


def _notebooks(folder: Path) -> Iterator[Path]:
    for pattern in ("*.ipynb", "*/*.ipynb"):
        yield from (path for path in folder.glob(pattern) if not path.parent.name.startswith("."))


def _parsed(path: Path) -> ast.Module:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    with warnings.catch_warnings():
        # Of escapes that are none, in somebody else's strings.
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())


class _Module:
    """One file, and what its names mean."""

    def __init__(self, path: Path, folder: Path) -> None:
        inner = path.relative_to(folder)
        below_src = inner.parts[0] == "src" and not (folder / "src" / "__init__.py").exists()
        self.file, self.root = inner.as_posix(), "src" if below_src else "."
        parts = (inner.relative_to("src") if below_src else inner).with_suffix("").parts
        self.package = parts[:-1]
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.names: dict[str, str] = {}

    def collect(self, tree: ast.Module, sources: _Sources) -> None:
        for node in ast.walk(tree):
            self._note_import(node)
            if name := _last(node):
                sources.losses |= {known for kind, known in _LOSSES.items() if name in (kind, known)}
        sources.imported |= {f"{self.name}.{name}": full for name, full in self.names.items()}
        for node in tree.body:
            if isinstance(node, _Definition):
                self.names.setdefault(node.name, f"{self.name}.{node.name}")
        for node in tree.body:
            if isinstance(node, _Definition) and not node.name.startswith("_") and self.name:
                item = self._item(node)
                sources.items[item.full] = item
        assigned = (name.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for name in _targets(node))
        sources.names[self.name] = frozenset([*self.names, *assigned])

    def _note_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            above = self.package[: len(self.package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                self.names[alias.asname or alias.name] = f"{origin}.{alias.name}"

    def _full(self, node: ast.AST | None) -> str:
        """The name in full, such as `torch.nn.Module`; empty for what is no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Subscript):
            # Dataset[Tensor]
            return self._full(node.value) if not parts else ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not parts:
            head = node.value
        elif isinstance(node, ast.Name):
            head = node.id
        else:
            return ""
        first, *rest = head.split(".")
        return ".".join([self.names.get(first, first), *rest, *reversed(parts)])

    def _item(self, node: ast.ClassDef | _Function) -> _Item:
        is_class = isinstance(node, ast.ClassDef)
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        function = (inits[0] if inits else None) if isinstance(node, ast.ClassDef) else node
        parameters, needs = _parameters(function, skip=1 if is_class else 0)
        inside = [*ast.walk(node)]
        values = [item.value for item in inside if isinstance(item, ast.Return)] if not is_class else []
        returned = [self._full(value.func) for value in values if isinstance(value, ast.Call)]
        annotation = [] if isinstance(node, ast.ClassDef) else [self._full(node.returns)]
        candidate = Candidate(
            reference=f"{self.name}:{node.name}",
            root=self.root,
            place=f"{self.file}:{node.lineno}",
            needs=tuple(name for name in needs if name != "split"),
        )
        return _Item(
            full=f"{self.name}.{node.name}",
            candidate=candidate,
            parameters=frozenset(parameters),
            first=needs[0] if needs else "",
            bases=tuple(map(self._full, node.bases)) if isinstance(node, ast.ClassDef) else (),
            returns=tuple(filter(None, [*annotation, *returned])),
            calls=frozenset(self._full(item.func) for item in inside if isinstance(item, ast.Call)),
            is_class=is_class,
        )


def _targets(node: ast.Assign) -> Iterator[ast.Name]:
    yield from (target for target in node.targets if isinstance(target, ast.Name))


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _parameters(function: _Function | None, skip: int) -> tuple[list[str], list[str]]:
    """What can be given by name, and of that what has no default. skip: how many are not the caller's (self)."""
    if function is None:
        return [], []
    given = function.args
    by_place = [*given.posonlyargs, *given.args]
    first_default = len(by_place) - len(given.defaults)
    names = [item.arg for item in (*given.args, *given.kwonlyargs)]
    own = {item.arg for item in by_place[:skip]}
    needed = [item.arg for item in by_place[:first_default]]
    needed += [item.arg for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    return [name for name in names if name not in own], [name for name in needed if name not in own]


def _resolved(sources: _Sources) -> dict[str, _Item]:
    """The items with the names of where things are defined in place of those by which packages hand them on."""

    def defined(name: str) -> str:
        # As many steps as packages lie within one another; imports may also be a circle.
        for _ in range(10):
            if name in sources.items or name not in sources.imported:
                break
            name = sources.imported[name]
        return name

    return {
        full: replace(
            item,
            bases=tuple(map(defined, item.bases)),
            returns=tuple(map(defined, item.returns)),
            calls=frozenset(map(defined, item.calls)),
        )
        for full, item in sources.items.items()
    }


def _sorted_out(items: Mapping[str, _Item]) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """Models, datasets that take `split`, and datasets that do not."""
    modules = _derived(items, _is_module)
    datasets = _derived(items, _is_dataset)
    functions = [item for item in items.values() if not item.is_class]
    models = [items[name] for name in sorted(modules) if not name.endswith(("Loss", "Criterion"))]
    models += [
        item
        for item in functions
        if any(name in modules or _is_module(name) for name in item.returns) or _MODEL_NAME.fullmatch(_short(item))
    ]
    by_split = [item for item in functions if "split" in item.parameters]
    sure = [
        item
        for item in by_split
        if any(name in datasets or _is_dataset(name) for name in item.returns) or "data" in _short(item).lower()
    ]
    called = [items[name] for name in sorted(datasets)]
    ready = [item for item in called if "split" in item.parameters]
    factories = _outermost([*(sure or by_split), *ready])
    rest = [item.candidate for item in called if "split" not in item.parameters]
    chosen = [item for item in _outermost(models) if item.first not in _WRAPPED and "split" not in item.parameters]
    return [item.candidate for item in chosen], [item.candidate for item in factories], rest


def _short(item: _Item) -> str:
    return item.candidate.reference.rpartition(":")[2]


def _derived(items: Mapping[str, _Item], is_one: Callable[[str], bool]) -> set[str]:
    """Classes that are derived, over any number of others, from what `is_one` knows."""
    below: dict[str, list[str]] = {}
    for name, item in items.items():
        for base in item.bases:
            below.setdefault(base, []).append(name)
    found: set[str] = set()
    pending = [name for base, names in below.items() if is_one(base) for name in names]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += below.get(name, ())
    return found


def _is_module(name: str) -> bool:
    last = name.rpartition(".")[2]
    ours = name.startswith(("torch.nn.", "torchvision.models.")) and not name.startswith("torch.nn.functional")
    return (ours and last[:1].isupper() and last != "Parameter") or last in _FRAMEWORK_MODULES


def _is_dataset(name: str) -> bool:
    last = name.rpartition(".")[2]
    return name.startswith("torchvision.datasets.") or (
        name.startswith("torch.utils.data.") and last.endswith(("Dataset", "Subset"))
    )


def _outermost(items: Iterable[_Item]) -> list[_Item]:
    """Those that no other one builds, or is derived from; all where each is used by another."""
    several = sorted(items, key=lambda item: item.candidate.place)
    used = {name for item in several for name in (*(item.calls - {item.full}), *item.bases)}
    return [item for item in several if item.full not in used] or several

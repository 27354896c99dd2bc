"""Closes a process to the user's code: what runs in it afterwards stands alone."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torchworker.process.failure import is_theirs


class _NoUserCode(importlib.abc.MetaPathFinder):
    """Refuses the user's modules by name and by place, also when they are installed in the environment."""

    def __init__(self, modules: Sequence[str], folder: str) -> None:
        self._modules, self._folder = frozenset(modules), Path(folder)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        inside = any(is_theirs(entry, self._folder) for entry in path or ())
        if fullname.partition(".")[0] in self._modules or inside:
            raise ImportError(f"the artifact needs the training code ({fullname}); a release must stand alone")
        return None


def forbid_user_code(modules: Sequence[str], folder: str) -> None:
    """From here on, importing any of these modules, or anything from the folder, fails."""
    sys.path[:] = [entry for entry in sys.path if entry and not is_theirs(entry, Path(folder))]
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] in modules:
            raise AssertionError(f"user module {loaded} was imported before the clean room was closed")
    sys.meta_path.insert(0, _NoUserCode(modules, folder))

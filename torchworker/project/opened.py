"""Which files the user's code reads: Python's audit hooks see what Python opens, inotify what libraries open natively.

What a release is made of is more than source files: a config.json beside the code, a vocabulary, pretrained weights.
What only the data opens is left out, as the data has a fingerprint of its own, and so is what the code itself writes.
"""

# Names as the code gave them, links and all, and quickly: pathlib would be called at every opening.
# ruff: noqa: PTH100, PTH113, PTH116, PTH119
from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import site
import stat
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

import torch.utils.data

from torchworker.contract import OpenedFile, Project
from torchworker.process.folder_watch import FolderWatch

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

NOT_INPUT = frozenset([
    "__pycache__", ".git", ".hg", ".svn", ".ship", ".venv", "node_modules", "site-packages", ".ipynb_checkpoints",
    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".cache",
])  # fmt: skip
"""Folders whose files are made by tools."""
_MACHINE = (
    "/proc", "/sys", "/dev", "/run", "/etc", "/lib", "/lib64", "/bin", "/sbin",
    *(f"/usr/{name}" for name in ("lib", "lib64", "libexec", "share", "include", "bin", "sbin", "local/lib")),
)  # fmt: skip
_CACHES = ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables that say where libraries keep what they download and compile."""
_MOST = 10_000
"""Files that are noted; a model that reads more reads data."""
_WRITES = os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY
_READERS = (str(Path(torch.utils.data.__file__ or "").parent) + "/", str(Path(__file__).parents[1] / "data") + "/")
"""Code that reads samples."""
_HEARD = frozenset(["open", "sqlite3.connect", "os.listdir", "os.scandir"])

_current: Opened | None = None
_hooked = False


class Opened:
    """What this process's user code opens, from when it is made until `close`. One at a time."""

    def __init__(self, project: Project, apart: Iterable[str] = (), *, python: bool = True) -> None:
        """
        Args:
            project: whose code it is; its snapshot of data is left out.
            apart: further absolute folders that are left out, such as the run's own.
            python: note what Python opens; without it only what is opened below the project while code is built.
        """
        self._project = os.path.abspath(project.folder)
        packages = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
        packages |= {site.getusersitepackages(), str(Path(__file__).parents[1])}
        self._packages = self._beside(packages)
        self._apart = self._beside([*apart, project.snapshot])
        self._machine = self._beside([*_MACHINE, *(os.environ.get(name, "") for name in _CACHES)])
        self._temporary = [os.path.abspath(tempfile.gettempdir()), os.path.realpath(tempfile.gettempdir())]
        self._began = time.time()
        self._code = self._data = 0
        """Blocks that are open."""
        self._files: dict[str, OpenedFile] = {}
        self._missing: set[str] = set()
        self._listed: set[str] = set()
        self._written: set[str] = set()
        self._read_as_data: set[str] = set()
        self._natively: dict[str, OpenedFile] = {}
        self._ignored: dict[str, bool] = {}
        self._watch = FolderWatch(self._project, self._is_unwatched)
        global _current
        _current = self
        if python:
            _install()

    def _beside(self, folders: Iterable[str]) -> list[str]:
        """As they are named and where links lead, without those that the project lies in."""
        named = {name for folder in folders if folder for name in (os.path.abspath(folder), os.path.realpath(folder))}
        return sorted(name for name in named if not _below(self._project + "/", name))

    # ---- what is going on

    @contextlib.contextmanager
    def code(self) -> Iterator[None]:
        """What is opened in this block counts, unless it is inside a block of data."""
        outermost = not self._code and not self._data
        if outermost:
            self._watch.drain()
        self._code += 1
        try:
            yield
        finally:
            self._code -= 1
            if outermost:
                self._see(self._watch.drain())

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """What is opened in this block does not count."""
        self._data += 1
        try:
            yield
        finally:
            self._data -= 1

    def _is_data(self) -> bool:
        if self._data or self._code:
            return self._data > 0
        if threading.current_thread() is not threading.main_thread():
            # Of a dataset that reads ahead, most of all.
            return True
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            if frame.f_code.co_filename.startswith(_READERS):
                return True
            frame = frame.f_back
        return False

    # ---- what is seen

    def _see(self, paths: Iterable[str]) -> None:
        """Below the project, by inotify: whoever it was."""
        for path in paths:
            found = _stat(path) if path not in self._natively and self._counts(path) else None
            # What was made since this began is made by the code.
            if found is not None and found.st_mtime < self._began:
                self._natively[path] = _noted(path, found, native=True)

    def hear_open(self, given: object, flags: object) -> None:
        """By Python. given: what it was asked to open."""
        path = _path_of(given)
        if path is None:
            return
        if self._is_data():
            if len(self._read_as_data) < _MOST:
                self._read_as_data.add(path)
            return
        if not self._counts(path):
            return
        if isinstance(flags, int) and flags & _WRITES:
            self._written.add(path)
            return
        if path in self._files or path in self._written or len(self._files) >= _MOST:
            return
        found = _stat(path)
        inside = _below(path, self._project)
        if found is None:
            if inside and not os.path.lexists(path):
                self._missing.add(path)
        elif inside or found.st_ctime < self._began or not _is_below_any(path, self._temporary):
            self._files[path] = _noted(path, found)

    def hear_listing(self, given: object) -> None:
        """A folder of the project, by Python; not by Python's own search for modules and packages."""
        caller = sys._getframe(2).f_code.co_filename
        path = _path_of(given)
        if "importlib" in caller or path is None or self._is_data():
            return
        if _below(path + "/_", self._project) and len(self._listed) < _MOST and self._may_count(path + "/_"):
            self._listed.add(path)

    def _is_unwatched(self, folder: str) -> bool:
        return os.path.basename(folder).startswith(".") or not self._may_count(folder + "/_")

    def _counts(self, path: str) -> bool:
        if path not in self._ignored:
            self._ignored[path] = not self._may_count(path)
        return not self._ignored[path]

    def _may_count(self, path: str) -> bool:
        if _is_below_any(path, self._apart) or _is_below_any(path, self._packages):
            return False
        if _below(path, self._project):
            folders = os.path.relpath(path, self._project).split("/")[:-1]
            return NOT_INPUT.isdisjoint(folders)
        for name in (path, os.path.realpath(path)):
            # Beyond what it shares with the project, which may itself lie in a hidden folder.
            folders = name[len(os.path.commonpath([name, self._project])) :].split("/")[:-1]
            if any(folder.startswith((".", "torchinductor_")) for folder in folders):
                return False
            if not NOT_INPUT.isdisjoint(folders) or _is_below_any(name, (*self._machine, *self._packages)):
                return False
        return True

    # ---- what is told

    def close(self) -> tuple[list[OpenedFile], list[str]]:
        """Files in order of their paths, and folders of the project whose content was asked for."""
        global _current
        if _current is self:
            _current = None
        self._watch.close()
        found = dict(self._files)
        for path in self._written & found.keys():
            # Read first and written later: what counts is what it left.
            if (now := _stat(path)) is not None:
                found[path] = _noted(path, now)
        for path in self._missing - self._written - found.keys():
            if not os.path.lexists(path):
                found[path] = OpenedFile(path=path)
        for path, file in self._natively.items():
            if path not in self._read_as_data | self._written:
                found.setdefault(path, file)
        return [found[path] for path in sorted(found)], sorted(self._listed)


def counts_as_code(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """What a call of the function opens is part of what the release is made of."""
    return _in_block(function, Opened.code)


def counts_as_data(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """What a call of the function opens is the data's business."""
    return _in_block(function, Opened.data)


def _in_block(
    function: Callable[Arguments, Returned], block: Callable[[Opened], contextlib.AbstractContextManager[None]]
) -> Callable[Arguments, Returned]:
    @functools.wraps(function)
    def counted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        if _current is None:
            return function(*args, **kwargs)
        with block(_current):
            return function(*args, **kwargs)

    return counted


def _hear(event: str, given: tuple[object, ...]) -> None:
    if _current is None or event not in _HEARD:
        return
    # An exception would keep the user's code from opening the file.
    with contextlib.suppress(Exception):
        if event == "open":
            _current.hear_open(given[0], given[2])
        elif event == "sqlite3.connect":
            # Of what it opens natively; `:memory:` is none.
            if os.path.isfile(str(given[0])):
                _current.hear_open(given[0], 0)
        else:
            _current.hear_listing(given[0])


def _install() -> None:
    """Once a process: an audit hook stays."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_hear)
        # Workers that read data, and whatever else is forked, tell nobody.
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _current
    _current = None


def _path_of(given: object) -> str | None:
    """Absolute, and of the source where it is compiled code; None for a descriptor."""
    if not isinstance(given, str | bytes | os.PathLike):
        return None
    path = os.path.abspath(os.fsdecode(given))
    if path.endswith(".pyc") and "/__pycache__/" in path:
        with contextlib.suppress(ValueError):
            return importlib.util.source_from_cache(path)
    return path


def _stat(path: str) -> os.stat_result | None:
    """Of a regular file; None for anything else."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _noted(path: str, found: os.stat_result, *, native: bool = False) -> OpenedFile:
    identity = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return OpenedFile(path=path, identity=identity, native=native)


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _is_below_any(path: str, folders: Iterable[str]) -> bool:
    return any(_below(path, folder) for folder in folders)

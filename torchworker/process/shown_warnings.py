"""What Python's warnings said while a stage worked: kept beside its log, each with the package that said it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from torchworker.contract import WARNINGS, ShownWarning

LONGEST = 500
"""Characters of a text that are kept."""
MOST = 200
"""Different warnings that a process keeps: a text may have a number in it that is another one each time."""
_WARN = ("warnings", "_py_warnings", "typing_extensions")
"""Modules that show a warning for somebody else."""
_INSTALLED = r"[\\/](?:site|dist)-packages[\\/]"
_NATIVE = "Triggered internally at"
"""What torch's C++ adds to its warnings."""

_show = warnings.showwarning
_file: Path | None = None
_seen: set[ShownWarning] = set()


def keep_warnings(folder: Path) -> None:
    """From now on what is shown in this process, and in its forks, is also added to WARNINGS in a stage's folder, each
    once."""
    global _file
    _file = folder / WARNINGS
    _seen.clear()
    warnings.showwarning = _show_and_keep


def keep(shown: warnings.WarningMessage) -> None:
    """Add one that was caught, and is told in other words."""
    _keep(shown.message, shown.category, shown.filename, shown.lineno, None)


def _show_and_keep(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    _show(message, category, filename, lineno, file, line)
    _keep(message, category, filename, lineno, sys._getframe(1))


def _keep(message: Warning | str, category: type[Warning], filename: str, lineno: int, frame: FrameType | None) -> None:
    # Whatever is wrong with the folder or with a package: what warned goes on as it would.
    with contextlib.suppress(Exception):
        _add(message, category, filename, lineno, frame)


def _add(message: Warning | str, category: type[Warning], filename: str, lineno: int, frame: FrameType | None) -> None:
    if _file is None or len(_seen) >= MOST:
        return
    text = " ".join(str(message).split())
    package = _package(text, category, frame)
    found = ShownWarning(
        text=text[:LONGEST], category=category.__name__, where=f"{_short(filename)}:{lineno}", package=package,
        version=_version(package) if package else "",
    )  # fmt: skip
    if found in _seen:
        return
    _seen.add(found)
    line = json.dumps(dataclasses.asdict(found)) + "\n"
    # One write: ranks and forks add to the same file.
    descriptor = os.open(_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _package(text: str, category: type[Warning], frame: FrameType | None) -> str:
    """The top-level module that warns, which is not where the warning points; empty for the user's own code."""
    if _NATIVE in text:
        return "torch"
    while frame is not None and frame.f_globals.get("__name__") in _WARN:
        # Of @deprecated: the function that is.
        if owner := getattr(frame.f_locals.get("arg"), "__module__", ""):
            return _installed(owner)
        frame = frame.f_back
    if frame is not None:
        return _installed(str(frame.f_globals.get("__name__", "")))
    return _installed(category.__module__)


def _installed(module: str) -> str:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return "" if top == "builtins" else "python"
    place = getattr(sys.modules.get(top), "__file__", None) or ""
    return top if re.search(_INSTALLED, place) else ""


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    # Not by getattr: some packages warn when they are asked for it, and that warning would be kept with their version.
    if version := vars(sys.modules.get(package, object)).get("__version__"):
        return str(version)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    names = importlib.metadata.packages_distributions().get(package, ())
    return importlib.metadata.version(names[0]) if names else ""


def _short(filename: str) -> str:
    """`torch/optim/lr_scheduler.py`; of other files the name."""
    *above, last = re.split(_INSTALLED, filename)
    return last if above else Path(filename).name

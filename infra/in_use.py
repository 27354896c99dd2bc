"""Which folders of SHIP_HOME running processes use: the janitor leaves those alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from train_and_ship.infra.home import make_folder

LOCKS = ".locks"
_held: dict[Path, TextIO] = {}
"""By folder, until this process ends: the kernel frees a lock also after kill -9."""


def hold(folder: Path) -> None:
    """Use a folder until this process ends; it is made, or fetched, afterwards. Raises OSError."""
    if folder in _held:
        return
    place = _lock(folder)
    while True:
        file = place.open("a+")
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, place):
            break
        # It went with its folder between the two lines.
        file.close()
    _held[folder] = file


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses a folder; if so, none begins to while the block runs, and the lock goes after it."""
    place = _lock(folder)
    with place.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not _is_at(file, place):
            yield False
            return
        yield True
        place.unlink(missing_ok=True)


def forget_gone(folder: Path) -> None:
    """Take away the locks of what is gone from the folders in a folder."""
    for place in (folder / LOCKS).glob("*,*"):
        held = folder.joinpath(*place.name.split(",", 1))
        if not held.exists():
            with contextlib.suppress(OSError), unused(held):
                pass


def _is_at(file: TextIO, place: Path) -> bool:
    try:
        return place.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _lock(folder: Path) -> Path:
    """A file for each folder, outside it: folders are replaced, hashed and listed. No name has a comma."""
    return make_folder(folder.parent.parent / LOCKS) / f"{folder.parent.name},{folder.name}"

"""Files that anybody opens below a folder, by inotify: what libraries open natively, Python does not see."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

MOST = 4096
"""Folders and links that are watched; the system has a limit for all processes of a user."""
_OPENED = 0x00000020
_OVERFLOW = 0x00004000
_HEADER = struct.Struct("iIII")
"""Watch, mask, cookie, and the length of the name that follows."""


class FolderWatch:
    """Watches from when it is made until it is closed. Where the system has no inotify, nothing is seen."""

    def __init__(self, folder: str, skip: Callable[[str], bool]) -> None:
        """
        Args:
            folder: absolute.
            skip: whether a folder below it is left out, by its absolute path.
        """
        self._descriptor = -1
        self._places: dict[int, str] = {}
        """Watch to the path of its folder or, ending in no slash, of the link to a file."""
        if sys.platform != "linux":
            return
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            return
        for _, path in zip(range(MOST), _folders_and_links(folder, skip), strict=False):
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _OPENED)
            if watch >= 0:
                self._places[watch] = path

    def drain(self) -> set[str]:
        """Absolute paths of what was opened since this was last asked."""
        found: set[str] = set()
        while self._descriptor >= 0:
            try:
                events = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                watch, mask, _, length = _HEADER.unpack_from(events, at)
                name = events[at + _HEADER.size : at + _HEADER.size + length].rstrip(b"\0")
                at += _HEADER.size + length
                place = self._places.get(watch)
                if place is None or mask & _OVERFLOW:
                    continue
                if name and place.endswith("/"):
                    found.add(place + os.fsdecode(name))
                elif not name and not place.endswith("/"):
                    found.add(place)
        return found

    def close(self) -> None:
        """Stop watching; can be repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _folders_and_links(folder: str, skip: Callable[[str], bool]) -> Iterator[str]:
    """Every folder, with a slash at its end, the nearest first; and links to files, whose opening their folder is not
    told of. Links to folders are not gone into."""
    pending = [folder]
    while pending:
        here = pending.pop(0)
        yield here + "/"
        with contextlib.suppress(OSError), os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir():
                    if skip(entry.path):
                        continue
                    if entry.is_symlink():
                        yield entry.path + "/"
                    else:
                        pending.append(entry.path)
                elif entry.is_symlink() and Path(entry.path).is_file():
                    yield entry.path

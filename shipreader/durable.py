"""Files that a later process trusts: on the disk before they have their name, so that a power cut leaves none torn.

The same text stands in `torchworker` and `shipreader`, which are installed without each other; a test compares them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 8
"""Files that are synced at the same time: a disk puts them into one commit."""
DAMAGED = ".damaged"
"""Behind the name of what was set aside."""

_log = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do it for folders, and keep their names by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same for a folder and everything in it. Raises OSError."""
    below = [path for path in folder.rglob("*") if not path.is_symlink() and (path.is_file() or path.is_dir())]
    with ThreadPoolExecutor(min(AT_ONCE, 1 + len(below)), thread_name_prefix="sync") as pool:
        list(pool.map(sync, [*below, folder]))


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing. Raises OSError."""
    missing = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        missing.append(place)
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync(place.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file by rename: it has all of the content, or what it had before. Raises OSError."""
    # A name of its own: several processes may write the same file.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Give a folder, with all that is in it, the name from which on it is there. Raises OSError."""
    sync_tree(source)
    source.rename(target)
    sync(target.parent)


def set_aside(path: Path, why: str) -> None:
    """Keep a file or folder that cannot be used as `<name>.damaged`, in place of an earlier one, and log a warning.

    Args:
        path: what a power cut, a full disk or a person has left there.
        why: it cannot be used, in words.

    Raises:
        OSError: it cannot be renamed.
    """
    aside = path.with_name(path.name + DAMAGED)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
    path.replace(aside)
    _log.warning("%s: %s; it is kept as %s", path, why, aside.name)

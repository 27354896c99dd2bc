"""The files of a release on disk: what may lie there, by which path, with which size and hash."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shipreader.records import FileEntry, stays_below
from train_and_ship.infra.errors import ReleaseError


def require_file(path: Path, entry: FileEntry) -> None:
    """Raises ReleaseError unless the file at `path` has the entry's size and hash."""
    require_size(path, entry)
    if (sha256 := FileEntry.of(path).sha256) != entry.sha256:
        raise ReleaseError(f"{path}: expected SHA-256 {entry.sha256}, got {sha256}")


def require_size(path: Path, entry: FileEntry) -> None:
    """Raises ReleaseError unless the file at `path` has the entry's size."""
    size = path.stat().st_size
    if size != entry.bytes:
        raise ReleaseError(f"{path}: expected {entry.bytes:,} bytes, got {size:,}")


def file_table(files: Mapping[str, FileEntry]) -> dict[str, dict[str, Any]]:
    """A table of files as manifests write it."""
    return {name: {"sha256": entry.sha256, "bytes": entry.bytes} for name, entry in files.items()}


def read_table(table: Mapping[str, Any]) -> dict[str, FileEntry]:
    """What `file_table` wrote, sorted. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    return {
        str(name): FileEntry(sha256=str(entry["sha256"]), bytes=int(entry["bytes"]))
        for name, entry in sorted(table.items())
    }


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below `folder` by relative POSIX path, sorted. Raises ReleaseError for anything but files."""
    if folder.is_symlink() or not folder.is_dir():
        raise ReleaseError(
            f"release folder {folder}: expected a folder, got {'a link' if folder.is_symlink() else 'none'}"
        )
    found = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                path = Path(entry.path)
                if stat.S_ISDIR(mode):
                    pending.append(path)
                elif stat.S_ISREG(mode):
                    found.append((path.relative_to(folder).as_posix(), path))
                else:
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                    raise ReleaseError(f"{path}: expected a regular file, got {kind}; copy the content instead")
    yield from sorted(found)


def require_relative(name: str) -> None:
    """Raises ReleaseError unless `name` is safe as a key and as a path below a folder."""
    if not stays_below(name):
        raise ReleaseError(f"file name {name!r}: expected a relative path with / between its parts and no ..")

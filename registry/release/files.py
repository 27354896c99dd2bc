"""The files of a release on disk: what may lie there, by which path, with which size and hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shipreader.errors import RefusedError
from shipreader.records import LONGEST_PART, LONGEST_PATH, MOST_PARTS, FileEntry, files_below, stays_below
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


def walk(folder: Path) -> list[tuple[str, Path]]:
    """Every file below `folder` by relative POSIX path, sorted. Raises ReleaseError for anything but files."""
    try:
        return sorted(files_below(folder))
    except RefusedError as error:
        raise ReleaseError(f"{error}") from None


def require_relative(name: str) -> None:
    """Raises ReleaseError unless `name` is safe as a key and as a path below a folder."""
    if not stays_below(name):
        raise ReleaseError(
            f"file name {name!r}: expected a relative path with / between its parts and no .., "
            f"at most {LONGEST_PATH} characters, {MOST_PARTS} parts and {LONGEST_PART} bytes of each"
        )

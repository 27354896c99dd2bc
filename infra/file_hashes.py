"""Hashes of files by content, remembered for as long as a file's inode, size and times say that it is the same one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
from pathlib import Path

from train_and_ship.infra.home import make_folder

SETTLED_SECONDS = 2.0
"""A file that changed this recently is not remembered: a change in the same tick of the file system's clock looks like
none."""

ELSEWHERE = "s3://"
"""What the names of objects in buckets begin with."""

Identity = tuple[int | str, ...]
"""What says that something is still what was read."""
_LOOKED_FOR: Identity = ()
"""Of a file that was noted: no file is like that."""


def identity_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """Inode, size, time of modification and time of change, both in nanoseconds. The last cannot be put back."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class FileHashes:
    """SHA-256 of files below one folder, or of a few files that belong together. Threads may share it."""

    def __init__(self, home: Path, about: str) -> None:
        """
        Args:
            home: SHIP_HOME, where hashes are kept.
            about: whose files they are, such as a folder's path.
        """
        name = hashlib.sha256(about.encode()).hexdigest()[:20]
        self._path = home / "hashes" / f"{name}.json"
        self._known: dict[str, tuple[Identity, str]] = self._read()
        self._changed = False

    def _read(self) -> dict[str, tuple[Identity, str]]:
        try:
            said = json.loads(self._path.read_text())
            return {str(name): (tuple(known[:-1]), str(known[-1])) for name, known in said.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            # It only saves time.
            return {}

    def sha256(self, path: Path) -> str:
        """Hexadecimal. Raises OSError for a file that cannot be read."""
        return self.recall(str(path), identity_of(path.stat())) or self.fresh(path)

    def fresh(self, path: Path) -> str:
        """The same, read now whatever is remembered, and remembered from now on."""
        # A device, or a pipe, may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "expected a regular file", str(path))
        began = time.time()
        with path.open("rb") as file:
            before = identity_of(os.fstat(file.fileno()))
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            same = identity_of(os.fstat(file.fileno())) == before
        if same and before[3] / 1e9 < began - SETTLED_SECONDS:
            self.remember(str(path), before, sha256)
        return sha256

    def note(self, path: Path) -> None:
        """Remember that a run on this machine has looked for a file, there or not, whatever is in it."""
        if str(path) not in self._known:
            self.remember(str(path), _LOOKED_FOR, "")

    def has_noted(self, path: Path) -> bool:
        """Whether one has, or its hash is remembered."""
        return str(path) in self._known

    def recall(self, name: str, identity: Identity) -> str | None:
        """Hexadecimal; None when it is not known, or was known as something else."""
        known = self._known.get(name)
        return known[1] if known is not None and known[0] == identity else None

    def remember(self, name: str, identity: Identity, sha256: str) -> None:
        """Whoever calls it has read it, and knows that whatever changes it changes its identity."""
        if self._known.get(name) != (identity, sha256):
            self._known[name] = identity, sha256
            self._changed = True

    def save(self) -> None:
        """Keep what is known, of files that are still there. Where that cannot be written, files are read again."""
        if not self._changed:
            return
        table = {
            name: [*identity, sha256]
            for name, (identity, sha256) in self._known.items()
            if name.startswith(ELSEWHERE) or identity == _LOOKED_FOR or Path(name).exists()
        }
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            make_folder(self._path.parent)
            part.write_text(json.dumps(table))
            part.replace(self._path)

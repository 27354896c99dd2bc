"""Find pickles by what is in a file, whatever its name: reading one runs whatever code it names.

Two of torch's own formats are zip archives with entries in pickle's encoding. TorchScript's (`data.pkl`,
`constants.pkl`, `*.debug_pkl`) are read by torch's C++ unpickler, which knows tensors and the classes in the same
archive, and calls nothing. `.pt2` archives hold their sample inputs as a torch.save archive; torch reads it with
`weights_only=True` first and falls back to an open unpickler, so what is in ours has to pass the first.
"""

from __future__ import annotations

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from train_and_ship.infra.errors import ReleaseError

TORCHSCRIPT_ENTRIES = (".pkl", ".debug_pkl")
SAMPLE_INPUTS = "/data/sample_inputs/model.pt"
"""The one record of a `.pt2` archive that torch.save has written."""
DIRECTORY_BYTES = 2**24
"""Of the directories of all archives in a release: some 100,000 records."""
PICKLED_BYTES = 2**26
"""In pickle's encoding that are parsed in a release: about 40 s. Of weights hardly any are."""
_LONGEST_HEAD = 2**20
"""Bytes that are parsed. A pickle that does not end by then is found by what it would call."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What they unpack costs no more memory than is asked for at once."""


@dataclass
class Effort:
    """What looking through one release may still cost: a small archive can hold a great deal."""

    directories: int = DIRECTORY_BYTES
    pickled: int = PICKLED_BYTES

    def parsed(self, size: int, where: str) -> None:
        """Note what was parsed. Raises ReleaseError where it was too much. where: in words."""
        self.pickled -= size
        if self.pickled < 0:
            raise ReleaseError(
                f"{where}: expected at most {PICKLED_BYTES:,} bytes in pickle's encoding in a release, got more"
            )


@contextlib.contextmanager
def opened(file: IO[bytes], where: str, effort: Effort) -> Iterator[zipfile.ZipFile]:
    """An archive, to be looked through. Raises ReleaseError when it cannot be, then or in the block.

    Args:
        file: the archive.
        where: it is, in words.
        effort: what looking may cost.
    """
    try:
        # What `zipfile` reads as a whole and makes objects of; the number of records beside it binds nobody.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        effort.directories -= end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
        if effort.directories < 0:
            raise ReleaseError(f"{where}: expected directories of at most {DIRECTORY_BYTES:,} bytes, got more")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type not in _METHODS:
                    raise ReleaseError(f"{where}: expected records that are stored or deflated, got {record.filename}")
            yield archive
    except ReleaseError:
        raise
    except Exception as error:
        # It has many ways to say that bytes are wrong: BadZipFile, zlib.error, RuntimeError, ValueError, …
        raise ReleaseError(f"{where}: expected an archive that can be looked through, got: {error}") from error


def find_pickle(path: Path, kind: str | None, effort: Effort | None = None) -> str | None:
    """Where in a file a pickle is, in words; None when there is none. Reads only.

    Args:
        path: the file.
        kind: the format of which it is the artifact, such as `torchscript`; None for other files.
        effort: what looking through the release of which it is a part may still cost; None for a file by itself.

    Raises:
        ReleaseError: it ends as an archive and cannot be looked through, or only at a price that no release is worth.
    """
    effort = effort or Effort()
    with path.open("rb") as file:
        if _begins_one(file, path.name, effort):
            return "it is a pickle"
        if not _ends_as_archive(file):
            return None
        with opened(file, path.name, effort) as archive:
            for record in archive.infolist():
                name = record.filename
                if kind == "torchscript" and name.endswith(TORCHSCRIPT_ENTRIES):
                    continue
                if kind == "pt2" and name.endswith(SAMPLE_INPUTS):
                    continue
                # A torch.save archive is known by its data.pkl.
                with archive.open(record) as entry:
                    if name.endswith(TORCHSCRIPT_ENTRIES) or _begins_one(entry, f"{path.name}: {name}", effort):
                        return f"{name} in it is a pickle"
    return None


def _ends_as_archive(file: IO[bytes]) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        # An archive in several files.
        return True


def _begins_one(file: IO[bytes], where: str, effort: Effort) -> bool:
    """Whether a pickle is at the beginning of a file that was just opened."""
    head = file.read(2)
    if not _is_head(head):
        return False
    found, size = _parsed(head + file.read(_LONGEST_HEAD - len(head)))
    effort.parsed(size, where)
    return found


def is_pickle(data: bytes) -> bool:
    """Whether bytes begin with a pickle of protocol 2 or later, as every library has written for a decade."""
    return len(data) >= 3 and _is_head(data) and _parsed(data)[0]


def _is_head(data: bytes) -> bool:
    return len(data) >= 2 and data[0] == 0x80 and data[1] in range(2, 6)


def _parsed(data: bytes) -> tuple[bool, int]:
    """Whether it is a pickle, and how many bytes of it were parsed to know."""
    calls, size = False, 0
    try:
        for opcode, _, position in pickletools.genops(data):
            size = position or 0
            calls = calls or opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "NEWOBJ", "BUILD")
            if opcode.name == "STOP":
                return True, size
    except Exception:
        # Weights may begin with these two bytes too; they do not go on as a pickle.
        return calls and len(data) == _LONGEST_HEAD, size
    return calls, size

"""Look through a release before anything of it is loaded: pickles, and every record of the archives that torch reads.

TorchScript, `.pt2` and AOTInductor packages are zip archives. torch writes them one way (records stored as they are but
for TorchScript's code, one after the other, each name once), and what is packed otherwise is nobody's export: it is
refused, also because two readers of one archive may see two contents in it.
"""

from __future__ import annotations

import pickletools
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shipreader.records import stays_below
from torchworker.contract import INT8_OF
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.release.pickles import SAMPLE_INPUTS, TORCHSCRIPT_ENTRIES, Effort, find_pickle, opened

ARCHIVES = ("torchscript", "pt2", "aoti")
"""Formats that are archives."""
LARGEST_CODE = 2**28
"""Bytes of all code in a TorchScript archive, unpacked."""
LARGEST_JSON = 2**27
"""Bytes of a JSON record, which is read as a whole."""
HEAD = b"PK\x03\x04"
_END, _END_BYTES, _HEADER_BYTES = b"PK\x05\x06", 22, 30
_ENCRYPTED = 0x1

_TENSORS = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) (set|bytearray|complex)|_codecs encode"
    r"|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout|torch(\.storage|\.cuda|\.sparse|\.cuda\.sparse)? \w+(Storage|Tensor)"
    r"|torch (Tensor|Size|device|bool|(b?float|u?int|q?u?int|complex|bits)\d\w*|per_(tensor|channel)_\w+)"
)
"""What tensors are made of, as pickle's GLOBAL names it: what torch reads with `weights_only=True`, and no more."""
_PROGRAM = re.compile(r"__torch__[.\w]* \w+|torch\.jit\._pickle \w+")
"""And classes of the archive itself, which torch's C++ reader looks for there and nowhere else."""
_USES_PICKLE = re.compile(rb'"use_pickle"\s*:\s*true')


def require_sound(folder: Path, manifest: Manifest) -> None:
    """Look through every file of a release, downloaded and verified by hash, before any of it is loaded. Reads only.

    Raises ReleaseError with the file, the record in it, what was expected and what was found.
    """
    kinds = {path: INT8_OF.get(kind, kind) for kind, path in manifest.formats.items()}
    effort = Effort()
    for name in manifest.files:
        path, kind = folder / name, kinds.get(name)
        if (found := find_pickle(path, kind, effort)) is not None:
            raise ReleaseError(f"{path}: expected no pickle in a release, got one ({found}): it is not loaded")
        if kind in ARCHIVES and (fault := find_fault(path, kind, effort)) is not None:
            raise ReleaseError(f"{path}: expected an archive as torch writes it, got {fault}: it is not loaded")


def find_fault(path: Path, kind: str, effort: Effort | None = None) -> str | None:
    """What is wrong with an archive, in words; None when nothing is. Reads only.

    Args:
        path: the file.
        kind: one of ARCHIVES.
        effort: what looking through its release may still cost; None for a file by itself.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return next(_faults(file, size, kind, effort or Effort(), inner=False), None)
    except ReleaseError as error:
        return f"one that is not looked through ({error})"


def _faults(file: IO[bytes], size: int, kind: str, effort: Effort, *, inner: bool) -> Iterator[str]:
    """inner: of a torch.save archive that is a record of another one."""
    file.seek(max(0, size - _END_BYTES))
    if file.read(4) != _END:
        yield "a file that does not end as one"
        return
    with opened(file, "samples" if inner else kind, effort) as archive:
        records = archive.infolist()
        yield from _packing(records, size, "" if inner else kind)
        for record in records:
            yield from _content(archive, record, kind, effort, inner=inner)


def _packing(records: list[zipfile.ZipInfo], size: int, kind: str) -> Iterator[str]:
    """Faults of names, sizes and places; they do not ask what is inside."""
    seen: set[str] = set()
    end = code = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        name = record.filename
        if not stays_below(name) or record.orig_filename != name:
            yield f"a record with the name {record.orig_filename!r}"
        if name in seen:
            yield f"two records with the name {name!r}"
        seen.add(name)
        packed = record.compress_type == zipfile.ZIP_DEFLATED and kind == "torchscript" and "/code/" in name
        if record.flag_bits & _ENCRYPTED or not (packed or record.compress_type == zipfile.ZIP_STORED):
            yield f"{name}, which is not stored as it is"
        code += record.file_size * packed
        if record.file_size != record.compress_size and not packed:
            yield f"{name} with two sizes, {record.compress_size:,} and {record.file_size:,} bytes"
        if record.header_offset < end or (end == 0 and record.header_offset != 0):
            yield f"{name}, which does not lie behind the record before it"
        end = record.header_offset + _HEADER_BYTES + record.compress_size
    if end > size:
        yield f"records of more than its {size:,} bytes"
    if code > LARGEST_CODE:
        yield f"code of {code:,} bytes, more than {LARGEST_CODE:,}"


def _content(
    archive: zipfile.ZipFile, record: zipfile.ZipInfo, kind: str, effort: Effort, *, inner: bool
) -> Iterator[str]:
    name = record.filename
    # Opened also for its name there, which has to be the same.
    with archive.open(record) as entry:
        head = entry.read(len(HEAD))
        if not inner and kind == "pt2" and name.endswith(SAMPLE_INPUTS):
            # torch reads it with an open unpickler where its own does not do.
            if head != HEAD:
                yield f"{name}, which is no archive of tensors"
                return
            entry.seek(0)
            # Each step back in a record reads it from its beginning.
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(entry, copy)
                faults = _faults(copy, record.file_size, kind, effort, inner=True)
                yield from (f"{name} with {fault}" for fault in faults)
        elif head == HEAD:
            yield f"{name}, an archive in the archive"
        elif name.endswith(TORCHSCRIPT_ENTRIES):
            entry.seek(0)
            program = not inner and kind == "torchscript"
            pickled = entry.read(effort.pickled + 1)
            effort.parsed(len(pickled), name)
            yield from (f"{name}, which names {what}" for what in _foreign(pickled, program=program))
        elif kind != "torchscript" and name.endswith(".json"):
            entry.seek(0)
            text = entry.read(LARGEST_JSON + 1)
            if len(text) > LARGEST_JSON:
                yield f"{name} of more than {LARGEST_JSON:,} bytes"
            if _USES_PICKLE.search(text):
                yield f"{name}, by which tensors are read as pickles"


def _foreign(pickled: bytes, *, program: bool) -> Iterator[str]:
    """What else than tensors a pickle names. program: whether classes of TorchScript are none of it."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL":
                if not _TENSORS.fullmatch(str(argument)) and not (program and _PROGRAM.fullmatch(str(argument))):
                    yield str(argument)
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                yield f"something by {opcode.name}"
    except Exception as error:
        yield f"nothing that can be read ({type(error).__name__})"

"""Find pickles by what is in a file, whatever its name: reading one runs whatever code it names.

Two of torch's own formats are zip archives with entries in pickle's encoding. TorchScript's (`data.pkl`,
`constants.pkl`, `*.debug_pkl`) are read by torch's C++ unpickler, which knows tensors and the classes in the same
archive, and calls nothing. `.pt2` archives hold their sample inputs as a torch.save archive; torch reads it with
`weights_only=True` first and falls back to an open unpickler, so what is in ours has to pass the first.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

TORCHSCRIPT_ENTRIES = (".pkl", ".debug_pkl")
SAMPLE_INPUTS = "/data/sample_inputs/model.pt"
"""The one record of a `.pt2` archive that torch.save has written."""
_LONGEST_HEAD = 2**20
"""Bytes that are parsed. A pickle that does not end by then is found by what it would call."""


def find_pickle(path: Path, kind: str | None) -> str | None:
    """Where in a file a pickle is, in words; None when there is none. Reads only.

    kind: the format of which it is the artifact, such as `torchscript`; None for other files.
    """
    with path.open("rb") as file:
        head = file.read(_LONGEST_HEAD)
    if is_pickle(head):
        return "it is a pickle"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if kind == "torchscript" and name.endswith(TORCHSCRIPT_ENTRIES):
                continue
            if kind == "pt2" and name.endswith(SAMPLE_INPUTS):
                continue
            # A torch.save archive is known by its data.pkl.
            with archive.open(name) as entry:
                if name.endswith(TORCHSCRIPT_ENTRIES) or is_pickle(entry.read(_LONGEST_HEAD)):
                    return f"{name} in it is a pickle"
    return None


def is_pickle(data: bytes) -> bool:
    """Whether bytes begin with a pickle of protocol 2 or later, as every library has written for a decade."""
    if len(data) < 3 or data[0] != 0x80 or data[1] not in range(2, 6):
        return False
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(data):
            calls = calls or opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "NEWOBJ", "BUILD")
            if opcode.name == "STOP":
                return True
    except Exception:
        # Weights may begin with these two bytes too; they do not go on as a pickle.
        return calls and len(data) == _LONGEST_HEAD
    return calls

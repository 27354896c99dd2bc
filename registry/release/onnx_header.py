"""What an ONNX file asks of whoever loads it, read field by field: weights are stepped over, not read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as field_of
from itertools import islice
from pathlib import Path

from torchworker.contract import EXTERNAL_DATA
from train_and_ship.infra.errors import ReleaseError

ENDING = ".onnx"
"""Of its name: what ends in `.ort` is a format of its own to ONNX Runtime, and servers get it as `model.onnx`."""
MOST_FIELDS = 5_000_000
"""Of one file that are looked at, in some 8 s; a model of 10,000 operators has some 300,000."""
MOST_DEEP = 100
"""Messages within messages, as protobuf's own readers have it."""
_IR_VERSION, _OPSET_IMPORT = 1, 8
"""Fields of ModelProto."""
_DOMAIN, _VERSION = 1, 2
"""Fields of OperatorSetIdProto."""
_TENSOR, _EXTERNAL_DATA, _DATA_LOCATION = "TensorProto", 13, 14
"""The message, and its fields that say that its values are in another file."""
_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})
"""Its fields that hold values."""
_WHERE = (b"location", b"offset", b"length")
"""What a tensor says of values in another file, each once; torch's and ONNX's own writers say no more."""
_LONGEST_WORD, _DIGITS = 512, 18
"""Of that: bytes that are looked at, and digits of a number at most."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""How protobuf writes a field; the others are groups, which ONNX has none of."""
_LARGEST_KEY = 2**32
"""Readers cut off what is above."""
_HOLDS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR, 6: "GraphProto", 10: _TENSOR, 11: "GraphProto", 22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}  # fmt: skip
"""Message to its fields in which tensors may be."""

_Field = tuple[int, int | None, int, int]
"""Its number in its message, its value where that is a number, and from where to where its content is."""


def onnx_versions(path: Path) -> dict[str, int]:
    """`IR version`, and `opset` of ONNX's own operators; empty for a file that is no ONNX model."""
    found: dict[str, int] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field, value, start, end in _fields(data, 0, len(data)):
                if field == _IR_VERSION and value is not None:
                    found["IR version"] = value
                elif field == _OPSET_IMPORT and value is None:
                    found |= _opset(data, start, end)
    except ValueError:
        return {}
    return found if len(found) == 2 else {}


def require_one_model(path: Path, beside: Path | None = None) -> None:
    """An ONNX file is the same model by whatever name, and in whatever folder, it is loaded. Reads only.

    What it holds is asked, not its name (`ENDING`).

    Args:
        path: the file.
        beside: the one file with weights that goes wherever it goes, in its folder; None where it goes alone.

    Raises:
        ReleaseError: it is ONNX Runtime's own format, or no ONNX, or has weights in another file than `beside`, or
            beyond its end, or more fields than anybody looks at.
    """
    if beside is not None and (beside.is_symlink() or not beside.is_file() or beside.parent != path.parent):
        raise ReleaseError(f"{beside}: expected a file with weights in the folder of {path}, got none, or a link")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] == b"ORTM":
                raise ReleaseError(
                    f"{path}: expected an ONNX model, got ONNX Runtime's own format, which servers that know the file "
                    "by another name read as another model, or not at all; export onnx again"
                )
            _require_whole(path, data, beside)
    except ValueError as error:
        raise ReleaseError(f"{path}: expected an ONNX model, got {error}") from error


def _require_whole(path: Path, data: mmap.mmap, beside: Path | None) -> None:
    """Raises ReleaseError for a tensor that is not where it may be, ValueError for what is no message."""
    seen = 0
    stack: list[tuple[str, Iterator[_Field], _Place]] = [("ModelProto", _fields(data, 0, len(data)), _Place())]
    while stack:
        message, fields, place = stack[-1]
        found = next(fields, None)
        if found is None:
            _require_place(path, place, beside)
            stack.pop()
            continue
        seen += 1
        if seen > MOST_FIELDS:
            raise ReleaseError(f"{path}: expected an ONNX model of at most {MOST_FIELDS:,} fields, got more")
        number, value, start, end = found
        if message == _TENSOR:
            place.note(data, found)
        elif number in _HOLDS[message] and value is None:
            if len(stack) == MOST_DEEP:
                raise ValueError(f"messages within messages to a depth of more than {MOST_DEEP}")
            stack.append((_HOLDS[message][number], _fields(data, start, end), _Place()))


@dataclass
class _Place:
    """Where a tensor says that its values are."""

    inside: bool = False
    """In the message."""
    locations: set[int | None] = field_of(default_factory=set)
    said: list[tuple[bytes, ...]] = field_of(default_factory=list)
    """Of another file, name and value of each word."""

    def note(self, data: mmap.mmap, found: _Field) -> None:
        """One of the tensor's fields."""
        number, value, start, end = found
        self.inside = self.inside or number in _VALUES
        if number == _DATA_LOCATION:
            self.locations.add(value)
        elif number == _EXTERNAL_DATA and len(self.said) <= len(_WHERE):
            parts = {n: data[at : min(to, at + _LONGEST_WORD)] for n, _, at, to in islice(_fields(data, start, end), 3)}
            self.said.append(tuple(parts[number] for number in sorted(parts)))


def _require_place(path: Path, place: _Place, beside: Path | None) -> None:
    """Raises ReleaseError unless a tensor's values are in it, or inside the file beside it."""
    if not place.said and place.locations <= {0}:
        return
    if beside is None:
        raise ReleaseError(
            f"{path}: expected an ONNX model with its weights in it, got one with weights in another file (external "
            f"data), which is no file of its release: export it as one file (external_data=False), or with its weights "
            f"in {path.name}{EXTERNAL_DATA} beside it"
        )
    said = dict(words for words in place.said if len(words) == 2)
    whole = len(place.said) == len(_WHERE) and said.keys() == set(_WHERE) and place.locations == {1}
    if not whole or place.inside or said[b"location"] != beside.name.encode():
        raise ReleaseError(
            f"{path}: expected the values of each tensor in it, or in {beside.name} with location, offset and length, "
            f"got a tensor with weights in another file (external data), or that says it otherwise: {place.said}"
        )
    words = said[b"offset"], said[b"length"]
    ends = [int(word) for word in words if word.isdigit() and len(word) <= _DIGITS]
    size = beside.stat().st_size
    if len(ends) < 2 or sum(ends) > size:
        raise ReleaseError(
            f"{path}: expected tensors inside the {size:,} bytes of {beside.name}, got one at offset {words[0]!r} of "
            f"length {words[1]!r}"
        )


def _opset(data: mmap.mmap, begin: int, finish: int) -> dict[str, int]:
    """Of one domain; nothing of those that are not ONNX's own."""
    domain, version = b"", 0
    for field, value, start, end in _fields(data, begin, finish):
        if field == _DOMAIN and value is None:
            domain = data[start:end]
        elif field == _VERSION:
            version = value or 0
    return {"opset": version} if domain in (b"", b"ai.onnx") and version else {}


def _fields(data: mmap.mmap, at: int, finish: int) -> Iterator[_Field]:
    """The fields of a message that ends at `finish`. Raises ValueError for what is no message."""
    while at < finish:
        key, at = _varint(data, at, finish)
        field, how = key >> 3, key & 7
        if not field or key >= _LARGEST_KEY:
            raise ValueError(f"a field with the key {key}")
        if how == _VARINT:
            value, at = _varint(data, at, finish)
            yield field, value, at, at
            continue
        if how not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"wire type {how}")
        length, at = _varint(data, at, finish) if how == _BYTES else (8 if how == _FIXED64 else 4, at)
        if at + length > finish:
            raise ValueError("a field that is longer than its message")
        yield field, None, at, at + length
        at += length


def _varint(data: mmap.mmap, at: int, finish: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = shift = 0
    while at < finish:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
    raise ValueError("a number that is cut off")

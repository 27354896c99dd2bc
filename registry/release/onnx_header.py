"""What an ONNX file asks of whoever loads it, read from its outermost fields: weights are stepped over, not read."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_IR_VERSION, _OPSET_IMPORT = 1, 8
"""Fields of ModelProto."""
_DOMAIN, _VERSION = 1, 2
"""Fields of OperatorSetIdProto."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""How protobuf writes a field; the others are groups, which ONNX has none of."""


def onnx_versions(path: Path) -> dict[str, int]:
    """`IR version`, and `opset` of ONNX's own operators; empty for a file that is no ONNX model."""
    found: dict[str, int] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            while file.tell() < size:
                field, value = _field(file, size, wanted=_OPSET_IMPORT)
                if field == _IR_VERSION and isinstance(value, int):
                    found["IR version"] = value
                elif field == _OPSET_IMPORT and value:
                    found |= _opset(file, file.tell() + value)
    except (EOFError, ValueError):
        return {}
    return found if len(found) == 2 else {}


def _opset(file: BinaryIO, end: int) -> dict[str, int]:
    """Of one domain; nothing of those that are not ONNX's own. end: where the message ends."""
    domain, version = b"", 0
    while file.tell() < end:
        field, value = _field(file, end, wanted=_DOMAIN)
        if field == _DOMAIN:
            domain = file.read(value or 0)
        elif field == _VERSION:
            version = value or 0
    return {"opset": version} if domain in (b"", b"ai.onnx") and version else {}


def _field(file: BinaryIO, end: int, wanted: int) -> tuple[int, int | None]:
    """The next field and its number; of bytes their length, with the file where they begin if they are wanted, else
    behind them. Raises ValueError for what is no message."""
    key = _varint(file)
    field, how = key >> 3, key & 7
    if how == _VARINT:
        return field, _varint(file)
    if how not in (_FIXED64, _BYTES, _FIXED32):
        raise ValueError(f"wire type {how}")
    length = _varint(file) if how == _BYTES else 8 if how == _FIXED64 else 4
    if file.tell() + length > end:
        raise ValueError("a field that is longer than its message")
    if how == _BYTES and field == wanted:
        return field, length
    file.seek(length, 1)
    return field, None


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")

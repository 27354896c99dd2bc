"""An ONNX file, written one tensor after the other.

onnx_ir builds the whole message before it serializes it, which takes the memory of the weights three times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

GRAPH, INITIALIZER = 7, 5
"""Numbers of the fields `ModelProto.graph` and `GraphProto.initializer` (onnx.proto)."""
LARGEST = 2**31
"""Bytes of a message that protobuf does not read."""
LENGTH_DELIMITED = 2
"""Wire type of a message inside a message (https://protobuf.dev/programming-guides/encoding)."""


def save_onnx(model: Any, path: Path) -> None:
    """Write a model as the one protobuf message that it is, its weights last.

    Args:
        model: onnx_ir.Model, as it was when this is over.
        path: of the file.

    Raises:
        ValueError: it would have 2 GiB or more, which protobuf does not read.
    """
    import onnx_ir
    from onnx_ir.serde import serialize_model

    held = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    try:
        for value, _ in held:
            value.const_value = onnx_ir.tensor([0.0])
        message = serialize_model(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    del message.graph.initializer[:]
    graph = message.graph.SerializeToString()
    message.ClearField("graph")
    sizes = [_tensor(*item).ByteSize() for item in held]
    begins = [_begin(INITIALIZER, size) for size in sizes]
    whole = len(graph) + sum(map(len, begins)) + sum(sizes)
    if whole >= LARGEST:
        raise ValueError(f"an ONNX file of {whole:,} bytes, expected less than {LARGEST:,}: protobuf reads no more")
    with path.open("wb") as file:
        file.write(message.SerializeToString() + _begin(GRAPH, whole) + graph)
        for begin, item in zip(begins, held, strict=True):
            file.write(begin + _tensor(*item).SerializeToString())


def _tensor(value: Any, tensor: Any) -> Any:
    """As onnx_ir writes it, an onnx.TensorProto."""
    from onnx_ir.serde import serialize_tensor

    tensor.name = value.name
    return serialize_tensor(tensor)


def _begin(field: int, size: int) -> bytes:
    """What stands before a message of so many bytes in a field."""
    return _varint(field << 3 | LENGTH_DELIMITED) + _varint(size)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth set."""
    parts = []
    while number >= 128:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])

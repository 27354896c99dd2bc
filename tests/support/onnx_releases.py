"""Small releases with a real ONNX model that says which one it is: `y` is `x` times the number it was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from train_and_ship.registry.release.manifest import Manifest, build_manifest

WIDTH = 4
SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", WIDTH]}],
}


def onnx_release(folder: Path, factor: float, model: str = "digits", breaks_at: int | None = None) -> Manifest:
    """A release in a new folder. breaks_at: it raises where the largest value of `x` is this or more."""
    folder.mkdir(parents=True)
    tensors = [numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32) * factor, "weight")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    if breaks_at is not None:
        tensors.append(numpy_helper.from_array(np.zeros(breaks_at, np.float32), "table"))
        nodes = [
            helper.make_node("MatMul", ["x", "weight"], ["scaled"]),
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["zero"]),
            helper.make_node("Add", ["scaled", "zero"], ["y"]),
        ]
    graph = helper.make_graph(nodes, model, [x], [y], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return build_manifest(folder, model=model, formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})


KINDS: dict[str, list[dict[str, object]]] = {
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": ["batch"]},
        {"name": "half", "dtype": "float16", "shape": ["batch", 2]},
        {"name": "id", "dtype": "int64", "shape": ["batch"]},
        {"name": "flag", "dtype": "bool", "shape": ["batch"]},
    ],
    "outputs": [
        {"name": "log", "dtype": "float32", "shape": ["batch"]},
        {"name": "same", "dtype": "float16", "shape": ["batch", 2]},
        {"name": "row", "dtype": "int64", "shape": ["batch", 1]},
        {"name": "not", "dtype": "bool", "shape": ["batch"]},
    ],
    "dims": [{"name": "batch", "min": 1, "max": 8}],
}


def kinds_release(folder: Path) -> Manifest:
    """Number types of all kinds, at most 8 samples: the logarithm of `x`, 10 times `id` from a table of 10 rows."""
    folder.mkdir(parents=True)
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
    types["bool"] = TensorProto.BOOL
    inputs, outputs = (
        [helper.make_tensor_value_info(item["name"], types[item["dtype"]], item["shape"]) for item in KINDS[side]]
        for side in ("inputs", "outputs")
    )
    nodes = [
        helper.make_node("Log", ["x"], ["log"]),
        helper.make_node("Identity", ["half"], ["same"]),
        helper.make_node("Gather", ["table", "id"], ["row"]),
        helper.make_node("Not", ["flag"], ["not"]),
    ]
    table = numpy_helper.from_array(np.arange(0, 100, 10)[:, None], "table")
    graph = helper.make_graph(nodes, "kinds", inputs, outputs, [table])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return build_manifest(folder, model="digits", formats={"onnx": "model.onnx"}, signature=KINDS, metrics={})

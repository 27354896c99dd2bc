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


def onnx_release(folder: Path, factor: float, model: str = "digits") -> Manifest:
    """A release in a new folder."""
    folder.mkdir(parents=True)
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32) * factor, "weight")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], model, [x], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return build_manifest(folder, model=model, formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})

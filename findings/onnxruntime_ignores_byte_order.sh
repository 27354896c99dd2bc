#!/usr/bin/env bash
# onnxruntime 1.31.1 (numpy 2.4.6): a numpy array in big-endian byte order is taken as if it were little-endian.
# FITS and netCDF files, many binary tables and `np.dtype(">f4")` give such arrays; numpy computes with them rightly, and
# torch.from_numpy refuses them. InferenceSession.run checks the type, sees float32, reads the bytes as they lie, and answers
# with other numbers: no error, no warning. Whoever ships a model and feeds it straight from such a file gets wrong answers
# that look like any others. `array.astype(array.dtype.newbyteorder("="))` before the call is enough.
# seen: 2026-11-29: [1. 2. 3.] little-endian: [1. 2. 3.]; big-endian: [4.6006e-41 8.9683e-44 2.3049e-41]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
little = np.array([1, 2, 3], "<f4")
big = little.astype(">f4")
assert np.array_equal(little, big) and big.dtype == np.dtype(">f4")
(right,), (found,) = (session.run(None, {"x": array}) for array in (little, big))
print(f"{little} little-endian: {right}; big-endian: {found}")
assert np.array_equal(right, little), right
if np.array_equal(found, little):
    raise SystemExit("the byte order is heeded: the behaviour has changed")
PYTHON

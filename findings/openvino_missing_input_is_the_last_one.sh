#!/usr/bin/env bash
# openvino 2026.4.1: a compiled model that is called without one of its inputs answers with the value of the last call.
# `compiled({"x": …})` of a model with the inputs x and mask neither raises nor takes zeros: the infer request behind the
# compiled model keeps the tensor that was set before. In a server that builds the dict from what a client sent, a
# forgotten field is so filled from an earlier request, and the answer looks like any other. ONNX Runtime refuses the same
# call ("Required inputs (['mask']) are missing"), and so does OpenVINO for a name too many. Hold the names against
# compiled.inputs before each call.
# seen: 2026-11-29: x and mask 7: [8. 8. 8.]; then x alone: [8. 8. 8.]; x and mask 100: [101. 101. 101.]; then x alone: [101. 101. 101.]
# seen: 2026-11-29: a name too many: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import openvino
from openvino import opset13 as ops

x = ops.parameter([-1], np.float32, name="x")
mask = ops.parameter([-1], np.float32, name="mask")
x.output(0).set_names({"x"})
mask.output(0).set_names({"mask"})
compiled = openvino.compile_model(openvino.Model([ops.add(x, mask)], [x, mask], "sum"), "CPU")
ones = np.ones(3, np.float32)
said = []
for value in (7, 100):
    full = compiled({"x": ones, "mask": np.full(3, value, np.float32)})[0]
    short = compiled({"x": ones})[0]
    said.append(f"x and mask {value}: {full}; then x alone: {short}")
    assert np.array_equal(full, short), "a missing input no longer is that of the last call"
print("; ".join(said))
try:
    compiled({"x": ones, "mask": ones, "other": ones})
except RuntimeError as error:
    print("a name too many:", type(error).__name__)
else:
    raise SystemExit("a name too many is taken now")
PYTHON

#!/usr/bin/env bash
# torch 2.13.0's ONNX exporter (dynamo=True) drops `divisor_override` of avg_pool2d and avg_pool3d without a word.
# The AveragePool node of the file divides by the size of the window, so a 2x2 pool that shall divide by 1 (sums, as in
# counts and density maps) gives a quarter of what the model gives; no warning, no error, and the file passes onnx.checker.
# It is found by any comparison of outputs, and only by one: the export itself reports success. What exports rightly is the
# pool without the override, times the size of the window, divided by the divisor.
# seen: 2026-11-29: avg_pool2d(ones, 2, divisor_override=1): torch 4.0, ONNX Runtime 1.0; warnings that name it: 0
# seen: 2026-11-29: avg_pool2d(ones, 2) * 4: torch 4.0, ONNX Runtime 4.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 \
  onnxscript==0.7.2 onnxruntime==1.31.1
"$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
import warnings

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

picture = torch.ones(1, 1, 4, 4)


class Override(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2, divisor_override=1)


class Scaled(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2) * 4


def answers(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exported = torch.onnx.export(model, (picture,), dynamo=True, opset_version=20, verbose=False)
    onnx.checker.check_model(exported.model_proto)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: picture.numpy()})
    named = [item for item in caught if "divisor" in str(item.message)]
    return float(model(picture).max()), float(got.max()), len(named)


torch_gives, onnx_gives, named = answers(Override())
print(f"avg_pool2d(ones, 2, divisor_override=1): torch {torch_gives}, ONNX Runtime {onnx_gives}; warnings that name it: {named}")
assert (torch_gives, onnx_gives, named) == (4.0, 1.0, 0), "the behaviour has changed"
torch_gives, onnx_gives, _ = answers(Scaled())
print(f"avg_pool2d(ones, 2) * 4: torch {torch_gives}, ONNX Runtime {onnx_gives}")
assert torch_gives == onnx_gives == 4.0
PYTHON

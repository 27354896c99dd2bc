"""Runs a release's ONNX artifact in Triton's Python backend, for Triton builds without the ONNX Runtime backend.

`ship view triton --backend python` puts a copy of it beside each model.onnx. It imports numpy, onnxruntime and Triton's
own module, which have to be in the Python environment of the backend, and nothing of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Triton's hook: open the ONNX Runtime session."""
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._inputs = [item["name"] for item in json.loads(args["model_config"])["input"]]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._batches = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests that Triton put together: one run for all of them where the first dimension is the batch."""
        fed = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        if not self._batches:
            return [self._answer(self._session.run(self._outputs, inputs)) for inputs in fed]
        sizes = [len(inputs[self._inputs[0]]) for inputs in fed]
        together = {name: np.concatenate([inputs[name] for inputs in fed]) for name in self._inputs}
        arrays = self._session.run(self._outputs, together)
        ends = np.cumsum(sizes)
        return [
            self._answer([array[end - size : end] for array in arrays]) for size, end in zip(sizes, ends, strict=True)
        ]

    def _answer(self, arrays: list[Any]) -> Any:
        tensors = [pb_utils.Tensor(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

"""An MLServer runtime for ONNX models, with MLServer's adaptive batching. Copied to where MLServer looks for models.

It imports mlserver, numpy, onnxruntime and inference_tensors.py, which is copied beside it, and nothing else of this
package.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from inference_tensors import DTYPES, RequestError, Signature, from_values, require_id, require_shape
from mlserver import MLModel
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput


class OnnxModel(MLModel):  # type: ignore[misc]
    """One release. Requests that do not fit its signature are refused before they share a batch with others."""

    async def load(self) -> bool:
        """MLServer's hook: open the ONNX Runtime session."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Threads that spin when idle take a fifth of a core at 50 calls a second.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Whatever it is called, it is what the promotion has tried.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        path = self._settings.parameters.uri
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._signature = Signature.of(self._settings.parameters.extra["signature"])
        self._outputs = list(self._signature.outputs)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnx")
        # What was put around `predict` meanwhile is the batching.
        self._batched = self.predict
        self.predict = self._checked  # type: ignore[method-assign]
        return True

    async def unload(self) -> bool:
        """MLServer's hook: nothing to do at once."""
        # Requests may wait in its queue yet; session and thread go when the last of them is answered.
        return True

    async def _checked(self, payload: InferenceRequest) -> InferenceResponse:
        try:
            self._signature.require_names([item.name for item in payload.inputs])
            shapes = {item.name: self._shape(item) for item in payload.inputs}
            # Before anything is made of them.
            sizes = self._signature.require_sizes(shapes)
            names = self._signature.outputs_named([output.name for output in payload.outputs or ()])
            self._signature.require_small_answer(names, sizes)
            require_id(payload.id)
            inputs = [self._input(item, shapes[item.name]) for item in payload.inputs]
        except RequestError as error:
            raise InferenceError(str(error)) from None
        response = await self._batched(InferenceRequest(id=payload.id, inputs=inputs))
        response.outputs = [output for output in response.outputs if output.name in names]
        for output in response.outputs:
            if output.datatype.startswith("FP") and not np.isfinite(output.data.root).all():
                # It would be null over HTTP and an internal error over gRPC.
                raise InferenceError(f"output {output.name}: NaN or infinity, which MLServer cannot answer")
        response.model_name = self.name
        response.model_version = str(self._settings.parameters.extra["generation"])
        return response

    def _shape(self, item: RequestInput) -> list[int]:
        shape: list[int] = require_shape(self._signature.inputs[item.name], item.datatype, list(item.shape))
        return shape

    def _input(self, item: RequestInput, shape: list[int]) -> RequestInput:
        """The input as a flat list, which is what batches are made of."""
        array = from_values(self._signature.inputs[item.name], shape, item.data.root)
        return RequestInput(name=item.name, datatype=item.datatype, shape=shape, data=array.ravel().tolist())

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """MLServer's hook: one request, or several that were put together."""
        fed = {
            item.name: np.asarray(item.data.root, dtype=DTYPES[item.datatype]).reshape(item.shape)
            for item in payload.inputs
        }
        loop = asyncio.get_running_loop()
        try:
            # The loop goes on collecting the next batch.
            arrays = await loop.run_in_executor(self._thread, self._session.run, self._outputs, fed)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            # Of one request, or of all that were put together: MLServer does not say whose it was.
            raise InferenceError(f"the model does not take this input: {error}") from None
        outputs = [self._output(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)

    def _output(self, name: str, array: Any) -> ResponseOutput:
        """With the shape that the model made: MLServer's own codec makes [1, 1] of [1]."""
        datatype = self._signature.outputs[name].datatype
        return ResponseOutput(name=name, datatype=datatype, shape=list(array.shape), data=array.ravel().tolist())

"""An MLServer runtime for ONNX models, with MLServer's adaptive batching. Copied to where MLServer looks for models.

It imports mlserver, numpy and onnxruntime, and nothing of this package.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput

_DTYPES = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}
_DTYPES |= {f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}


class OnnxModel(MLModel):  # type: ignore[misc]
    """One release. Requests that do not fit its signature are refused before they share a batch with others."""

    async def load(self) -> bool:
        """MLServer's hook: open the ONNX Runtime session."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        path = self._settings.parameters.uri
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._wanted = {item.name: item for item in self._settings.inputs}
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
        given = {item.name: item for item in payload.inputs}
        if given.keys() != self._wanted.keys() or len(given) != len(payload.inputs):
            raise InferenceError(f"expected the inputs {', '.join(self._wanted)}; got {', '.join(given) or 'none'}")
        inputs = [self._input(given[name], wanted) for name, wanted in self._wanted.items()]
        if len({item.shape[0] for item in inputs if item.shape}) > 1 and self._settings.max_batch_size > 1:
            raise InferenceError(f"expected one batch size, got {[item.shape[0] for item in inputs]}")
        response = await self._batched(InferenceRequest(id=payload.id, inputs=inputs))
        if payload.outputs:
            names = [output.name for output in payload.outputs]
            if not set(names) <= set(self._outputs):
                raise InferenceError(f"expected outputs of {', '.join(self._outputs)}; got {', '.join(names)}")
            response.outputs = [output for output in response.outputs if output.name in names]
        response.model_name = self.name
        response.model_version = str(self._settings.parameters.extra["generation"])
        return response

    def _input(self, item: RequestInput, wanted: Any) -> RequestInput:
        """The input as a flat list, which is what batches are made of."""
        shape = list(item.shape)
        fits = len(shape) == len(wanted.shape) and all(w in (-1, s) for s, w in zip(shape, wanted.shape, strict=True))
        if item.datatype != wanted.datatype or not fits or min(shape, default=1) < 0:
            raise InferenceError(
                f"input {item.name}: expected {wanted.datatype} {wanted.shape}, got {item.datatype} {shape}"
            )
        try:
            array = np.asarray(item.data.root, dtype=_DTYPES[item.datatype]).reshape(shape)
        except (ValueError, TypeError, OverflowError) as error:
            raise InferenceError(f"input {item.name}: expected {item.datatype} of shape {shape}: {error}") from None
        return RequestInput(name=item.name, datatype=item.datatype, shape=shape, data=array.ravel().tolist())

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """MLServer's hook: one request, or several that were put together."""
        fed = {
            item.name: np.asarray(item.data.root, dtype=_DTYPES[item.datatype]).reshape(item.shape)
            for item in payload.inputs
        }
        loop = asyncio.get_running_loop()
        # The loop goes on collecting the next batch.
        arrays = await loop.run_in_executor(self._thread, self._session.run, self._outputs, fed)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)

"""The Open Inference Protocol over gRPC. An answer has bytes if the request had, and typed contents otherwise.

It imports grpc and the messages of NVIDIA's client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as services

from shipreader.inference_http import EXTENSIONS, NAME, VERSION
from shipreader.inference_limits import LOOPBACK, Limits
from shipreader.inference_model import Model
from shipreader.inference_served import Served, counted
from shipreader.inference_tensors import (
    MOST_BYTES,
    Request,
    RequestError,
    Tensor,
    from_bytes,
    from_values,
    require_id,
    require_shape,
    too_long,
)

SERVICE = "inference.GRPCInferenceService"
_CODES = {
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""By HTTP's status; INVALID_ARGUMENT for every other one."""
# The protocol's typed contents; FP16 has none and comes as bytes.
_CONTENTS = {
    "BOOL": "bool_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
}  # fmt: skip


def grpc_server(served: Served, port: int, limits: Limits) -> Any:
    """A server on loopback that is not started yet."""
    options = [
        # Otherwise a second server may take the same port, and half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MOST_BYTES),
        ("grpc.max_send_message_length", MOST_BYTES + 2**20),
        ("grpc.max_metadata_size", limits.head_bytes),
        ("grpc.absolute_max_metadata_size", limits.head_bytes),
        # Above what is answered RESOURCE_EXHAUSTED: beyond it streams are reset, which clients take for a fault.
        ("grpc.max_concurrent_streams", max(1000, 4 * limits.requests)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.head_seconds)),
    ]
    # Health and metadata have room above the requests that are counted.
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * limits.requests)
    service = Service(served)
    services.add_GRPCInferenceServiceServicer_to_server(service, server)
    # As bytes: their number is held against the release before anything is made of them.
    infer = grpc.unary_unary_rpc_method_handler(
        service.infer, response_serializer=messages.ModelInferResponse.SerializeToString
    )
    server.add_registered_method_handlers(SERVICE, {"ModelInfer": infer})
    server.add_insecure_port(f"{LOOPBACK}:{port}")
    return server


class Service(services.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The protocol's calls that are served; loading and unloading are not."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerReadyResponse(ready=self._served.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            self._served.named(request.name, request.version)
            return messages.ModelReadyResponse(ready=self._served.ready)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            document = self._served.metadata(self._served.named(request.name, request.version))
            for output in document["outputs"]:
                # Over gRPC metadata have none: a request asks for them.
                output.pop("parameters", None)
            return messages.ModelMetadataResponse(**document)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            model = self._served.named(self._served.name)
            item = messages.RepositoryIndexResponse.ModelIndex(name=model.name, version=model.version, state="READY")
            return messages.RepositoryIndexResponse(models=[item])

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            raise RequestError("the channel decides what is served: move it (ship promote, ship rollback)", 403)

    RepositoryModelUnload = RepositoryModelLoad

    async def infer(self, encoded: bytes, context: Any) -> Any:
        """ModelInfer, of an encoded ModelInferRequest."""
        async with _refusals(context):
            with self._served.visit() as visit:
                self._served.require_room()
                visit.hold(len(encoded))
                if self._served.model is not None:
                    most = self._served.model.signature.largest_request
                    if len(encoded) > most:
                        raise RequestError(too_long(most), 413)
                try:
                    request = messages.ModelInferRequest.FromString(encoded)
                except DecodeError:
                    raise RequestError("expected a ModelInferRequest, got other bytes") from None
                model = self._served.named(request.model_name, request.model_version)
                with counted(model):
                    visit.enter()
                    asked = _asked(request, model)
                    visit.hold(sum(len(text) for said in asked.said.values() for text in said.values()))
                    outputs = await model.infer(asked.inputs, asked.outputs)
                    model.signature.require_declared(asked.outputs, outputs, asked.sizes)
                    return _reply(asked, outputs, model)


@asynccontextmanager
async def _refusals(context: Any) -> AsyncIterator[None]:
    """Ends a call with what is wrong about the request."""
    try:
        yield
    except RequestError as error:
        await context.abort(_CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), str(error))


def _asked(request: Any, model: Model) -> Request:
    signature = model.signature
    signature.require_names([item.name for item in request.inputs])
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"expected raw_input_contents for all {len(request.inputs)} inputs, got {len(raw)}")
    shapes = {
        item.name: require_shape(signature.inputs[item.name], item.datatype, list(item.shape))
        for item in request.inputs
    }
    # Before anything is made of them.
    sizes = signature.require_sizes(shapes)
    outputs = signature.outputs_named([item.name for item in request.outputs])
    signature.require_small_answer(outputs, sizes)
    called = require_id(request.id)
    inputs = {}
    for place, item in enumerate(request.inputs):
        tensor, shape = signature.inputs[item.name], shapes[item.name]
        inputs[item.name] = from_bytes(tensor, shape, raw[place]) if raw else _typed(tensor, shape, item)
    # Looking up what is not there would add it.
    said = {
        item.name: signature.parameters_of(item.name)
        for item in request.outputs
        if "labels" in item.parameters and item.parameters["labels"].bool_param
    }
    return Request(called, inputs, outputs, sizes, frozenset(outputs if raw else ()), said)


def _typed(tensor: Tensor, shape: list[int], item: Any) -> Any:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise RequestError(f"input {tensor.name}: expected raw_input_contents, the only way for {tensor.datatype}")
    others = {found.name for found, _ in item.contents.ListFields()} - {field}
    if others:
        raise RequestError(
            f"input {tensor.name}: expected {field} for {tensor.datatype}, got {', '.join(sorted(others))}"
        )
    return from_values(tensor, shape, list(getattr(item.contents, field)))


def _reply(asked: Request, outputs: list[Any], model: Model) -> Any:
    reply = messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=asked.id)
    # Bytes for all or none: the protocol has no mixture.
    raw = bool(asked.binary) or any(model.signature.outputs[name].datatype not in _CONTENTS for name in asked.outputs)
    for name, array in zip(asked.outputs, outputs, strict=True):
        datatype = model.signature.outputs[name].datatype
        item = reply.outputs.add(name=name, datatype=datatype, shape=array.shape)
        for key, text in asked.said.get(name, {}).items():
            item.parameters[key].string_param = text
        if raw:
            reply.raw_output_contents.append(array.tobytes())
        else:
            getattr(item.contents, _CONTENTS[datatype]).extend(array.ravel().tolist())
    return reply

"""The Open Inference Protocol over gRPC. An answer has bytes if the request had, and typed contents otherwise.

What gRPC leaves open is bounded in shipreader/inference_calls.py. It imports grpc and the messages of NVIDIA's client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as services

from shipreader.inference_calls import CODES, Connections, Receiving, end_unless_taken
from shipreader.inference_canary import Canary
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
MOST_NAMES = 2**13
"""Bytes of the message of any call but ModelInfer: there are names in it."""
COPIES = 2
"""In which an answer is kept until it is taken: Python's and gRPC's own."""
PIECE = 2**14
"""Numbers that are made varints at once."""
_SHIFTS = np.arange(0, 70, 7, dtype=np.uint64)
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
        # Packed messages, which are refused, as over HTTP: what comes is not what is held then.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # What comes of a message before anybody reads it is 64 KiB then.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_metadata_size", limits.head_bytes),
        ("grpc.absolute_max_metadata_size", limits.head_bytes),
        # Above what is answered RESOURCE_EXHAUSTED: beyond it streams are reset, which clients take for a fault.
        ("grpc.max_concurrent_streams", max(1000, 4 * limits.requests)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.head_seconds)),
    ]
    # Health and metadata have room above the requests that are counted.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_not_about_clients)
    hooks = [_Answering(port, served)]
    # As many whose message is not here yet, of which one more ends another one.
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=4 * limits.requests, interceptors=hooks)
    service = Service(served)
    services.add_GRPCInferenceServiceServicer_to_server(service, server)
    # As bytes: their number is held against the release before anything is made of them.
    infer = grpc.unary_unary_rpc_method_handler(service.infer)
    server.add_registered_method_handlers(SERVICE, {"ModelInfer": infer})
    server.add_insecure_port(f"{LOOPBACK}:{port}")
    return server


def _not_about_clients(record: logging.LogRecord) -> bool:
    """Whether a record of gRPC's is not that somebody went, or was cut off, before the answer was taken."""
    return record.exc_info is None or not isinstance(record.exc_info[1], cygrpc.ExecuteBatchError)


class _Answering(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Receives the message of a call, and ends calls with what is wrong about it.

    To gRPC all of them are calls of many messages, of which one is read: of other ones it says nothing before the
    message is here.
    """

    def __init__(self, port: int, served: Served) -> None:
        self._served, self._connections = served, Connections(port)
        self._receiving = Receiving(served, self._connections)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC's hook: the handler of a call, with both."""
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        answer, decode = handler.unary_unary, handler.request_deserializer

        async def answered(_: Any, context: Any) -> Any:
            found: Any = None
            refusal: tuple[Any, str] | None = None
            try:
                encoded = await self._receiving.message(context)
                found = await answer(_decoded(encoded, decode) if decode is not None else encoded, context)
            except RequestError as error:
                # Not itself: what it was raised in would stay until it is taken.
                refusal = CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), str(error)
            end_unless_taken(context, self._connections, self._served)
            if refusal is not None:
                await context.abort(*refusal)
            return found

        return grpc.stream_unary_rpc_method_handler(answered, response_serializer=handler.response_serializer)


def _decoded(encoded: bytes, decode: Callable[[bytes], Any]) -> Any:
    """The message of a call that has names in it, at most."""
    if len(encoded) > MOST_NAMES:
        raise RequestError(too_long(MOST_NAMES), 413)
    try:
        return decode(encoded)
    except DecodeError:
        raise RequestError("expected a message of this call, got other bytes") from None


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
        self._served.named(request.name, request.version)
        return messages.ModelReadyResponse(ready=self._served.ready)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Protocol."""
        document = self._served.metadata(self._served.named(request.name, request.version))
        for output in document["outputs"]:
            # Over gRPC metadata have none: a request asks for them.
            output.pop("parameters", None)
        return messages.ModelMetadataResponse(**document)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """Protocol."""
        self._served.named(self._served.name)
        index = messages.RepositoryIndexResponse.ModelIndex
        items = [index(name=model.name, version=model.version, state="READY") for model in self._served.models]
        return messages.RepositoryIndexResponse(models=items)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Protocol."""
        raise RequestError("the channel decides what is served: move it (ship promote, ship rollback)", 403)

    RepositoryModelUnload = RepositoryModelLoad

    async def infer(self, encoded: bytes, context: Any) -> Any:
        """ModelInfer, of an encoded ModelInferRequest."""
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
            with counted(model) as request_of:
                visit.enter()
                asked = _asked(request, model, self._served.canary)
                # Until the answer is taken, or nobody is there to take it.
                kept = self._served.visit()
                context.add_done_callback(lambda _: kept.end())
                kept.hold(COPIES * sum(len(text) for said in asked.said.values() for text in said.values()))

                def render(model: Model, asked: Request, outputs: list[Any]) -> bytes:
                    kept.hold(COPIES * reply_bytes(asked, outputs, model))
                    return reply(asked, outputs, model)

                request_of.model, encoded = await self._served.answer(
                    model, asked, render, version=request.model_version
                )
                return encoded


def _asked(request: Any, model: Model, canary: Canary | None) -> Request:
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
    parameters = {}
    if canary is not None and (key := canary.document.key) in request.parameters:
        value = request.parameters[key]
        parameters[key] = getattr(value, value.WhichOneof("parameter_choice") or "", None)
    return Request(called, inputs, outputs, sizes, frozenset(outputs if raw else ()), said, parameters)


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


def _is_raw(asked: Request, model: Model) -> bool:
    """Bytes for all or none: the protocol has no mixture."""
    return bool(asked.binary) or any(model.signature.outputs[name].datatype not in _CONTENTS for name in asked.outputs)


def reply_bytes(asked: Request, outputs: list[Any], model: Model) -> int:
    """How long the numbers of an answer are as they are sent, before anything is made of them."""
    raw = _is_raw(asked, model)
    return sum(array.nbytes if raw or array.dtype.kind in "fb" else _varint_bytes(array) for array in outputs)


def _varint_bytes(array: Any) -> int:
    """Seven bits of a whole number go into a byte; a negative one has 64 bits."""
    most = int(np.iinfo(array.dtype).max)
    more = sum(int(np.count_nonzero(array >= 2**bits)) for bits in range(7, 64, 7) if 2**bits <= most)
    return int(array.size) + more + 9 * int(np.count_nonzero(array < 0))


def _varints(array: Any) -> Iterator[bytes]:
    flat = array.ravel()
    for begin in range(0, flat.size, PIECE):
        numbers = flat[begin : begin + PIECE]
        wide = (numbers if numbers.dtype == np.uint64 else numbers.astype(np.int64).view(np.uint64))[:, None]
        letters = ((wide >> _SHIFTS) & np.uint64(127)).astype(np.uint8)
        # Those behind which there is something left.
        goes_on = (wide >> _SHIFTS >> np.uint64(1) >> np.uint64(6)) != 0
        goes_on[:, -1] = False
        letters[goes_on] |= 128
        used = np.ones_like(goes_on)
        used[:, 1:] = goes_on[:, :-1]
        yield letters[used].tobytes()


def _field(key: int, *parts: bytes) -> list[bytes]:
    """One of protobuf's, of bytes."""
    size = sum(map(len, parts))
    return [*_varints(np.array([key << 3 | 2, size], np.int64)), *parts]


def reply(asked: Request, outputs: list[Any], model: Model) -> bytes:
    """An encoded ModelInferResponse; its numbers go into it as they are sent, and never through Python's."""
    head = messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=asked.id)
    parts, tail, raw = [head.SerializeToString()], [], _is_raw(asked, model)
    for name, array in zip(asked.outputs, outputs, strict=True):
        datatype = model.signature.outputs[name].datatype
        item = messages.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=array.shape)
        for key, text in asked.said.get(name, {}).items():
            item.parameters[key].string_param = text
        said = [item.SerializeToString()]
        if raw:
            tail += _field(6, array.tobytes())
        else:
            numbers = [array.tobytes()] if array.dtype.kind in "fb" else list(_varints(array))
            if array.size:
                key = messages.InferTensorContents.DESCRIPTOR.fields_by_name[_CONTENTS[datatype]].number
                numbers = _field(key, *numbers)
            said += _field(5, *numbers)
        parts += _field(5, *said)
    return b"".join([*parts, *tail])

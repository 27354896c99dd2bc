"""The process behind `ship serve`: the Open Inference Protocol over HTTP and gRPC, for one model on loopback.

It is told what to serve by lines of JSON on its standard input, answers each with one on its standard output, and ends
with the last of them: nobody else can change what is served, and it does not outlive who started it.

    {"model": "digits", "generation": 7, "artifact": "/…/model.onnx", "signature": {…}, "batch_size": 64}
    {"loaded": 7, "threads": "2 threads, which sleep when idle: …"}       or {"error": "…"}, and the one before stays

The new release is loaded before requests go to it; those that are with the old one are answered by it. It imports
starlette, uvicorn, grpc, the messages of NVIDIA's client, and prometheus_client, from an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import uvicorn
import uvloop
from prometheus_client import Counter, Summary, start_http_server
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as services

from shipreader.inference_model import Model, ModelDocument, Spinning, choose_spinning
from shipreader.inference_tensors import (
    Request,
    RequestError,
    Tensor,
    answer,
    from_bytes,
    from_values,
    parse,
    require_shape,
)

LOOPBACK = "127.0.0.1"
NAME = "train-and-ship"
VERSION = "1"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
MOST_BYTES = 256 * 2**20
"""Of a request. Longer ones are refused before they are read to their end."""
STOP_SECONDS = 10
JSON_LENGTH = "Inference-Header-Content-Length"

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
# Names and labels that MLServer's users have on their dashboards.
_SUCCESS = Counter("model_infer_request_success", "Requests that got an answer", ["model", "version"])
_FAILURE = Counter("model_infer_request_failure", "Requests that got none", ["model", "version"])
_SECONDS = Summary("model_infer_request_duration", "Seconds from a request to its answer", ["model", "version"])


class Served:
    """What is served. Replaced as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Model | None = None
        self._spinning: Spinning | None = None

    def load(self, document: ModelDocument) -> str:
        """In a thread: open it beside what is served, and then serve it; words about its threads."""
        if self._spinning is None:
            # Once: a release that follows does not wait for it.
            self._spinning = choose_spinning(document)
        self.model = Model(document, spin=self._spinning.spin)
        return self._spinning.words

    def named(self, name: str, version: str = "") -> Model:
        """Raises RequestError, 404, for another model or version than is served."""
        model = self.model
        if model is None:
            raise RequestError("no release is loaded yet", 503)
        if name != model.name:
            raise RequestError(f"expected the model {model.name}, got {name}", 404)
        if version not in ("", model.version):
            raise RequestError(
                f"expected version {model.version} of {name}, the channel's generation; got {version}", 404
            )
        return model

    def metadata(self, model: Model) -> dict[str, Any]:
        """As the protocol has it."""
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": "onnxruntime_onnx",
            "inputs": [tensor.metadata() for tensor in model.signature.inputs.values()],
            "outputs": [tensor.metadata() for tensor in model.signature.outputs.values()],
        }


@contextmanager
def _counted(model: Model) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        _FAILURE.labels(model.name, model.version).inc()
        raise
    _SUCCESS.labels(model.name, model.version).inc()
    _SECONDS.labels(model.name, model.version).observe(time.perf_counter() - began)


# ---- HTTP


def application(served: Served) -> Starlette:
    """The protocol's paths."""

    def model_of(request: HttpRequest) -> Model:
        return served.named(request.path_params["model"], request.path_params.get("version", ""))

    async def server(request: HttpRequest) -> Response:
        return _json({"name": NAME, "version": VERSION, "extensions": EXTENSIONS})

    async def live(request: HttpRequest) -> Response:
        return _json({"live": True})

    async def ready(request: HttpRequest) -> Response:
        return _json({"ready": served.model is not None}, 200 if served.model else 503)

    async def metadata(request: HttpRequest) -> Response:
        return _json(served.metadata(model_of(request)))

    async def model_ready(request: HttpRequest) -> Response:
        model = model_of(request)
        return _json({"name": model.name, "ready": True})

    async def index(request: HttpRequest) -> Response:
        model = served.named(served.name)
        return _json([{"name": model.name, "version": model.version, "state": "READY", "reason": ""}])

    async def change(request: HttpRequest) -> Response:
        raise RequestError("the channel decides what is served: move it (ship promote, ship rollback)", 403)

    async def infer(request: HttpRequest) -> Response:
        model = model_of(request)
        with _counted(model):
            body = await _body(request)
            asked = parse(body, _json_length(request), model.signature)
            outputs = await model.infer(asked.inputs, asked.outputs)
            data, length = answer(asked, outputs, model.name, model.version)
        if length is None:
            return Response(data, media_type="application/json")
        return Response(data, media_type="application/octet-stream", headers={JSON_LENGTH: str(length)})

    async def refused(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _json({"error": str(error)}, error.status)

    async def no_such_path(request: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return _json({"error": f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}"}, status)

    one = "/v2/models/{model}"
    routes = [
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", change, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", change, methods=["POST"]),
    ]
    for path in (one, one + "/versions/{version}"):
        routes += [
            Route(f"{path}/infer", infer, methods=["POST"]),
            Route(f"{path}/ready", model_ready),
            Route(path, metadata),
        ]
    handlers: Any = {RequestError: refused, 404: no_such_path, 405: no_such_path}
    return Starlette(routes=routes, exception_handlers=handlers)


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status, media_type="application/json")


async def _body(request: HttpRequest) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"Content-Encoding: expected none, got {encoding}", 415)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise RequestError(f"expected a request of at most {MOST_BYTES:,} bytes", 413)
            parts.append(part)
    except ClientDisconnect:
        raise RequestError("the client hung up") from None
    return b"".join(parts)


def _json_length(request: HttpRequest) -> int | None:
    text = request.headers.get(JSON_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise RequestError(f"{JSON_LENGTH}: expected a number of bytes, got {text[:60]!r}")
    return int(text)


# ---- gRPC

# The protocol's typed contents; FP16 has none and comes as bytes.
_CONTENTS = {
    "BOOL": "bool_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
}  # fmt: skip


class Service(services.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The same over gRPC. An answer has bytes if the request had, and typed contents otherwise."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerReadyResponse(ready=self._served.model is not None)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Protocol."""
        return messages.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            self._served.named(request.name, request.version)
            return messages.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            document = self._served.metadata(self._served.named(request.name, request.version))
            return messages.ModelMetadataResponse(**document)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            model = self._served.named(self._served.name)
            item = messages.RepositoryIndexResponse.ModelIndex(name=model.name, version=model.version, state="READY")
            return messages.RepositoryIndexResponse(models=[item])

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Protocol."""
        async with _refusals(context):
            model = self._served.named(request.model_name, request.model_version)
            with _counted(model):
                asked = _asked(request, model)
                outputs = await model.infer(asked.inputs, asked.outputs)
                return _reply(asked, outputs, model)


@asynccontextmanager
async def _refusals(context: Any) -> AsyncIterator[None]:
    """Ends a call with what is wrong about the request."""
    try:
        yield
    except RequestError as error:
        await context.abort(_CODES[error.status], str(error))


def _asked(request: Any, model: Model) -> Request:
    signature = model.signature
    signature.require_names([item.name for item in request.inputs])
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"expected raw_input_contents for all {len(request.inputs)} inputs, got {len(raw)}")
    inputs = {}
    for place, item in enumerate(request.inputs):
        tensor = signature.inputs[item.name]
        shape = require_shape(tensor, item.datatype, list(item.shape))
        inputs[item.name] = from_bytes(tensor, shape, raw[place]) if raw else _typed(tensor, shape, item)
    signature.require_sizes({name: array.shape for name, array in inputs.items()})
    outputs = signature.outputs_named([item.name for item in request.outputs])
    return Request(request.id, inputs, outputs, frozenset(outputs if raw else ()))


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
        if raw:
            reply.raw_output_contents.append(array.tobytes())
        else:
            getattr(item.contents, _CONTENTS[datatype]).extend(array.ravel().tolist())
    return reply


# ---- the process


async def serve(model: str, port: int) -> None:
    """Serve on `port`, gRPC on the next and metrics on the one after, until standard input ends."""
    # What a library prints goes to the log; the answers have the descriptor for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    served = Served(model)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    config = uvicorn.Config(
        application(served), lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=STOP_SECONDS
    )
    http = uvicorn.Server(config)
    # Otherwise a second server may take the same port, and half of the calls.
    limits = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MOST_BYTES),
        ("grpc.max_send_message_length", -1),
    ]
    rpc = grpc.aio.server(options=limits)
    services.add_GRPCInferenceServiceServicer_to_server(Service(served), rpc)
    rpc.add_insecure_port(f"{LOOPBACK}:{port + 1}")
    metrics, _ = start_http_server(port + 2, LOOPBACK)
    lines = asyncio.StreamReader(limit=MOST_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running: asyncio.Task[None] | None = None
    while line := await lines.readline():
        document = ModelDocument(**json.loads(line))
        try:
            words = await asyncio.to_thread(served.load, document)
        except Exception as error:
            logging.exception("generation %d", document.generation)
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
            continue
        logging.info("generation %d; %s", document.generation, words)
        if running is None:
            await rpc.start()
            running = asyncio.create_task(http.serve(sockets=[listener]))
            # uvicorn says so by a flag.
            while not http.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        print(json.dumps({"loaded": document.generation, "threads": words}), file=answers)
    http.should_exit = True
    # Both at once: whoever started us waits for 20 s.
    await asyncio.gather(rpc.stop(STOP_SECONDS), *([] if running is None else [running]))
    metrics.shutdown()


def main() -> None:
    """`model port`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))

"""The Open Inference Protocol over HTTP, and a port for who watches the server.

Loading and unloading are not on either: see shipreader/inference_server.py. Who may ask is seen by the Host, and for
browsers by the Origin: no page of another site gets an answer, or has one computed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from shipreader.inference_limits import OWN_HOSTS, Limits
from shipreader.inference_model import Model
from shipreader.inference_served import Served, Visit, counted
from shipreader.inference_tensors import MOST_JSON_BYTES, Request, RequestError, answer, parse, too_long

NAME = "train-and-ship"
VERSION = "1"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
JSON_LENGTH = "Inference-Header-Content-Length"
JSON_LENGTH_HEADER = JSON_LENGTH.lower().encode()
RETRY_SECONDS = "1"
MOST_KEPT = 100
"""Of the ways to write the names of this server."""

Message = MutableMapping[str, Any]
App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any]


def application(served: Served) -> App:
    """The protocol's paths."""

    def model_of(request: HttpRequest) -> Model:
        return served.named(request.path_params["model"], request.path_params.get("version", ""))

    async def server(request: HttpRequest) -> Response:
        return _json({"name": NAME, "version": VERSION, "extensions": EXTENSIONS})

    async def metadata(request: HttpRequest) -> Response:
        return _Taken(served, served.metadata_json(model_of(request)), media_type="application/json")

    async def model_ready(request: HttpRequest) -> Response:
        model = model_of(request)
        return _json({"name": model.name, "ready": served.ready}, 200 if served.ready else 503)

    async def index(request: HttpRequest) -> Response:
        served.named(served.name)
        return _json(
            [{"name": model.name, "version": model.version, "state": "READY", "reason": ""} for model in served.models]
        )

    async def change(request: HttpRequest) -> Response:
        raise RequestError("the channel decides what is served: move it (ship promote, ship rollback)", 403)

    async def infer(request: HttpRequest) -> Response:
        model, version = model_of(request), request.path_params.get("version", "")
        with counted(model) as request_of, served.visit() as visit:
            served.require_room()
            length, most = _lengths(request, model)
            body = await _body(request, most, visit)
            visit.enter()
            asked = parse(body, length, model.signature)
            request_of.model, (data, length) = await served.answer(model, asked, _rendered, version=version)
        if length is None:
            return _Taken(served, data, media_type="application/json")
        return _Taken(served, data, media_type="application/octet-stream", headers={JSON_LENGTH: str(length)})

    one = "/v2/models/{model}"
    routes = [
        Route("/v2", server),
        *_health(served),
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
    return from_own_hosts(_starlette(routes), served.limits)


def _rendered(model: Model, asked: Request, outputs: list[Any]) -> tuple[bytes, int | None]:
    return answer(asked, outputs, model.name, model.version)


def watching(served: Served) -> App:
    """For who watches the server: metrics, and the same health as on the port for requests."""

    async def metrics(request: HttpRequest) -> Response:
        return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return from_own_hosts(_starlette([Route("/metrics", metrics), *_health(served)]), served.limits)


def _health(served: Served) -> list[Route]:
    async def live(request: HttpRequest) -> Response:
        return _json({"live": True})

    async def ready(request: HttpRequest) -> Response:
        return _json({"ready": served.ready}, 200 if served.ready else 503)

    return [Route("/v2/health/live", live), Route("/v2/health/ready", ready)]


def _starlette(routes: list[Route]) -> Starlette:
    async def refused(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _refusal(error)

    async def no_such_path(request: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        words = f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}"
        return _refusal(RequestError(words, status))

    handlers: Any = {RequestError: refused, 404: no_such_path, 405: no_such_path}
    return Starlette(routes=routes, exception_handlers=handlers)


def from_own_hosts(app: App, limits: Limits) -> App:
    """Refuse what a browser asks for a page of another site.

    Such a page may ask any address: its requests carry its Origin. One whose name leads to 127.0.0.1 by now has the
    right Origin and the wrong Host. Whoever is no browser and names this machine, or a name in `limits.hosts`, sees
    none of it.
    """
    names = {*OWN_HOSTS, *map(str.lower, limits.hosts)}
    # As they stand in headers: a client says the same each time.
    good: set[bytes] = set()

    async def guarded(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := _foreign(scope["headers"], names, good)) is not None:
            await _refusal(error)(scope, receive, send)
            return
        await app(scope, receive, send)

    return guarded


def _foreign(headers: list[tuple[bytes, bytes]], names: set[str], good: set[bytes]) -> RequestError | None:
    found = [item for item in headers if item[0] == b"host" or item[0] == b"origin"]
    if len(found) == 1 and found[0][0] == b"host" and found[0][1] in good:
        return None
    hosts, origins = (
        [value.decode("latin-1").lower() for name, value in found if name == wanted] for wanted in (b"host", b"origin")
    )
    if len(hosts) > 1 or len(origins) > 1:
        return RequestError("expected one Host and one Origin at most")
    if hosts and host_name(hosts[0]) not in names:
        return RequestError(
            f"Host: expected one of {', '.join(sorted(names))}; got {hosts[0]!r} (ship serve --allow-host NAME, for a "
            "proxy that passes the name on)",
            421,
        )
    if origins:
        where = origins[0].partition("://")[2]
        # Another port of this machine is another site; a name that was allowed may come from any of its ports.
        if where not in hosts and (host_name(where) in OWN_HOSTS or host_name(where) not in names):
            return RequestError(f"Origin: expected a page of this server or none, got {origins[0]!r}", 403)
    if hosts and len(good) < MOST_KEPT:
        good.update(value for name, value in found if name == b"host")
    return None


def host_name(text: str) -> str:
    """The name in a Host header, without the port: `localhost` of `localhost:8080`, `::1` of `[::1]:8080`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


class _Taken(Response):
    """An answer that may be longer than what was asked: it counts as a request does until it is taken."""

    def __init__(self, served: Served, content: bytes, **options: Any) -> None:
        super().__init__(content, **options)
        self._served = served

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._served.visit() as visit:
            visit.hold(len(self.body))
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            # Waits until the body has gone out; shipreader/inference_connections.py ends who does not take it.
            await send({"type": "http.response.body", "body": b""})


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, media_type="application/json")


def _refusal(error: RequestError) -> Response:
    headers = {"Retry-After": RETRY_SECONDS} if error.status in (429, 503) else None
    return _json({"error": str(error)}, error.status, headers)


def _lengths(request: HttpRequest, model: Model) -> tuple[int | None, int]:
    """Of the JSON in front of binary data; of the longest body that is read.

    Raises RequestError for a body that is packed, or is too long by its own words.
    """
    json_length, most = None, model.signature.largest_request
    declared = b""
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            declared = value
        elif name == JSON_LENGTH_HEADER:
            if not (value.isdigit() and len(value) < 20):
                raise RequestError(f"{JSON_LENGTH}: expected a number of bytes, got {value[:60].decode('latin-1')!r}")
            json_length = int(value)
        elif name == b"content-encoding" and value != b"identity":
            raise RequestError(f"Content-Encoding: expected none, got {value.decode('latin-1')}", 415)
    if json_length is None:
        most = min(most, MOST_JSON_BYTES)
    if declared.isdigit() and (len(declared) > 19 or int(declared) > most):
        raise RequestError(too_long(most), 413)
    return json_length, most


async def _body(request: HttpRequest, most: int, visit: Visit) -> bytes:
    """All of it, of at most so many bytes. That it comes in time: shipreader/inference_connections.py."""
    parts, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            raise RequestError("the client hung up")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise RequestError(too_long(most), 413)
        visit.hold(len(part))
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)

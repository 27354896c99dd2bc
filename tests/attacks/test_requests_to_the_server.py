"""Requests want to take the model server's memory, its time, its place for others, or to come from a page of a browser.

The protocol's answers are asked in this process; what uvicorn and gRPC do with connections, of the real server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import select
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace as Of
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import numpy as np
import pytest

from shipreader.inference_canary import computed
from shipreader.inference_http import application, watching
from shipreader.inference_limits import Limits
from shipreader.inference_model import Model, ModelDocument
from shipreader.inference_served import Served
from shipreader.inference_tensors import (
    LONGEST_MESSAGE,
    MOST_BYTES,
    MOST_JSON_BYTES,
    RequestError,
    Signature,
    parse,
)
from shipreader.records import Manifest, Release
from tests.support.onnx_releases import KINDS, kinds_release
from tests.support.ports import free_ports
from tests.support.projects import REPOSITORY
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.ports import port_is_free
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.server import Server, requirements

INFER = "/v2/models/digits/infer"
GOOD: dict[str, Any] = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
        {"name": "half", "datatype": "FP16", "shape": [1, 2], "data": [1, 2]},
        {"name": "id", "datatype": "INT64", "shape": [1], "data": [9]},
        {"name": "flag", "datatype": "BOOL", "shape": [1], "data": [True]},
    ]
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """At most 8 samples; index 10 is beyond its table."""
    folder = tmp_path_factory.mktemp("kinds") / "release"
    made = kinds_release(folder)
    manifest = Manifest("digits", made.release, {}, made.formats, KINDS, {}, made.encode())
    return Release("prod", 7, folder, manifest, "")


@pytest.fixture
def served(release: Release) -> Served:
    found = Served("digits", Limits(requests=2, bytes_at_once=50_000))
    found.model = Model(ModelDocument("digits", 7, str(release.artifact("onnx")), KINDS, 8), spin=False)
    return found


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{**item, **changes} if item["name"] == name else item for item in GOOD["inputs"]]}


Client = httpx.AsyncClient


def with_client(served: Served, do: Callable[[Client], Awaitable[Any]], make: Any = application) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app=make(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            return await do(client)

    return asyncio.run(run())


def post(served: Served, body: Any = GOOD, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) or hasattr(body, "__aiter__") else json.dumps(body).encode()
    return with_client(served, lambda client: client.post(INFER, content=content, **options))


class Held:
    """In place of the model's session: computes nothing until it may, and counts."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls, self.go = session, 0, threading.Event()

    def run(self, names: Any, fed: Any) -> Any:
        self.calls += 1
        assert self.go.wait(30)
        return self.session.run(names, fed)


@pytest.fixture
def held(served: Served) -> Held:
    assert served.model is not None
    served.model._session = Held(served.model._session)
    return served.model._session


# ---- length


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_longer_than_the_release_can_take_is_refused_before_it_is_read(served: Served, declared: bool) -> None:
    given = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(100):
            given += 1
            yield b" " * 10_000

    served.limits = replace(served.limits, bytes_at_once=MOST_BYTES)
    answer = post(served, pieces(), headers={"Content-Length": "1000000"} if declared else {})
    assert answer.status_code == 413 and "expected a request of at most" in answer.json()["error"]
    assert given <= (1 if declared else 9)


def test_a_release_without_a_largest_batch_is_bounded_all_the_same() -> None:
    unbounded = Signature.of({name: KINDS[name] for name in ("inputs", "outputs")})
    assert unbounded.largest_request == MOST_BYTES and Signature.of(KINDS).largest_request < 80_000
    with pytest.raises(RequestError, match="at most 67,108,864 bytes; binary data may be longer") as refused:
        parse(b" " * (MOST_JSON_BYTES + 1), None, unbounded)
    assert refused.value.status == 413


def test_many_bodies_at_once_are_refused_before_the_memory_is_gone(served: Served) -> None:
    reading = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 40_000
        await reading.wait()
        yield json.dumps(GOOD).encode()

    async def both(client: Client) -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.create_task(client.post(INFER, content=slow()))
        await asyncio.sleep(0.05)
        second = await client.post(INFER, content=b" " * 20_000)
        reading.set()
        return await first, second

    first, second = with_client(served, both)
    assert (first.status_code, second.status_code) == (200, 429)
    assert "at most 50,000 may be" in second.json()["error"]
    assert post(served).status_code == 200, "what was refused holds nothing"


# ---- shapes, before anything is made of them


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"shape": [9], "data": [0] * 9}),
        ("x", {"shape": [2**40], "data": []}),
        ("x", {"shape": [2**63], "data": []}),
        ("x", {"shape": [1] * 1000, "data": [1]}),
        ("half", {"shape": [0, 2**62], "data": []}),
        ("half", {"shape": [2**62, 2], "data": []}),
        ("x", {"shape": [10**4000], "data": [float("nan")]}),
        ("x", {"data": [10**4000]}),
        ("x", {"shape": ["1"]}),
        ("x", {"data": [[1], [2]]}),
    ],
)
def test_a_shape_beyond_what_is_declared_is_refused_with_what_was_expected(
    served: Served, name: str, changes: dict[str, Any]
) -> None:
    answer = post(served, changed(name, **changes))
    assert answer.status_code in (400, 413), answer.text
    assert f"input {name}: expected" in answer.json()["error"]


def test_sizes_are_seen_before_the_data_of_any_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shipreader.inference_tensors.from_values", lambda *_: pytest.fail("read"))
    with pytest.raises(RequestError, match="input x: expected batch of 1 to 8, got 9"):
        parse(json.dumps(changed("x", shape=[9])).encode(), None, Signature.of(KINDS))
    # No range is declared, and numpy would find it too big.
    free = Signature.of({"inputs": [{"name": "x", "dtype": "float32", "shape": ["a", "b", "c"]}], "outputs": []})
    item = {"name": "x", "datatype": "FP32", "shape": [0, 2**62, 2**62], "data": []}
    with pytest.raises(RequestError, match="input x: expected at most 268,435,456 bytes"):
        parse(json.dumps({"inputs": [item]}).encode(), None, free)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"inputs": ' * 5000,
        b'{"inputs": [' + b"[" * 60_000 + b"]" * 60_000 + b"]}",
        b'{"inputs": [1e99999]}',
        b'{"inputs": [' + b"9" * 50_000 + b"]}",
        b'{"inputs": NaN}',
        b'{"inputs": "\\ud800"}',
    ],
)
def test_json_that_is_deep_or_has_endless_numbers_is_an_ordinary_mistake(served: Served, text: bytes) -> None:
    served.limits = replace(served.limits, bytes_at_once=MOST_BYTES)
    answer = post(served, text)
    assert answer.status_code in (400, 413) and len(answer.json()["error"]) <= LONGEST_MESSAGE


@pytest.mark.parametrize("number", ["1", "NaN"])
def test_of_two_keys_that_are_the_same_the_last_counts_for_either_parser(number: str) -> None:
    text = json.dumps(GOOD["inputs"])
    body = f'{{"inputs": [], "parameters": {{"a": {number}}}, "inputs": {text}, "id": "a", "id": "b"}}'
    assert parse(body.encode(), None, Signature.of(KINDS)).id == "b"


# ---- what is answered


def test_an_output_that_is_asked_for_many_times_is_no_longer_answer(served: Served) -> None:
    answer = post(served, {**GOOD, "outputs": [{"name": "row"}] * 500})
    assert answer.status_code == 400 and "expected each output once" in answer.json()["error"]
    assert len(answer.content) < LONGEST_MESSAGE + 100


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [{"name": "n" * 5000}] * 4},
        changed("x", shape=list(range(2000))),
        {**GOOD, "id": "i" * 5000},
        {**GOOD, "id": {"deep": [1]}},
        {**GOOD, "outputs": [{"name": "n" * 5000}]},
    ],
)
def test_a_refusal_does_not_give_back_what_was_sent(served: Served, body: dict[str, Any]) -> None:
    answer = post(served, body)
    assert answer.status_code == 400 and len(answer.json()["error"]) <= LONGEST_MESSAGE


LABELS = ["no", "y\N{LATIN SMALL LETTER E WITH ACUTE}s" * 1000]
ASKED = {**GOOD, "outputs": [{"name": "log", "parameters": {"labels": True}}]}


@pytest.fixture
def labelled(release: Release) -> Served:
    """Whose release has labels, and whose limit of bytes is two answers with them and a half."""
    found = Served("digits", Limits(bytes_at_once=10_000))
    signature = {**KINDS, "labels": LABELS}
    found.model = Model(ModelDocument("digits", 7, str(release.artifact("onnx")), signature, 8), spin=False)
    return found


@pytest.mark.parametrize("body", [b"", json.dumps(ASKED).encode()])
def test_what_is_said_of_labels_counts_until_it_is_taken(labelled: Served, body: bytes) -> None:
    method, path = ("POST", INFER) if body else ("GET", "/v2/models/digits")
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"localhost")]}
    app = application(labelled)
    waiting, both = 0, asyncio.Event()

    async def ask(taken: asyncio.Event) -> tuple[int, bytes]:
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            # As a connection does that is not read: it waits with what follows a body.
            nonlocal waiting
            if any(one.get("body") for one in said) and not taken.is_set():
                waiting += 1
                if waiting == 2:
                    both.set()
                await asyncio.wait_for(taken.wait(), 30)
            said.append(message)

        await app(dict(scope), receive, send)
        return said[0]["status"], b"".join(one.get("body", b"") for one in said)

    async def run() -> list[tuple[int, bytes]]:
        taken = asyncio.Event()
        slow = [asyncio.create_task(ask(taken)) for _ in range(2)]
        await asyncio.wait_for(both.wait(), 30)
        answers = [await ask(asyncio.Event())]
        held = labelled.bytes
        taken.set()
        answers += [await one for one in slow]
        assert held == sum(len(text) for _, text in answers[1:]) and labelled.bytes == labelled.requests == 0
        return [*answers, await ask(taken)]

    refused, *good = asyncio.run(run())
    assert refused[0] == 429 and [status for status, _ in good] == [200] * 3
    for _, text in good:
        assert json.loads(json.loads(text)["outputs"][0]["parameters"]["labels"]) == LABELS


def test_metadata_are_made_once_for_a_release_and_go_with_it(labelled: Served, served: Served) -> None:
    first, second = labelled.model, served.model
    assert first is not None and second is not None
    made = labelled.metadata_json(first)
    assert labelled.metadata_json(first) is made and "é" in made.decode()
    labelled.model = second
    assert "labels" not in labelled.metadata_json(second).decode()
    assert list(labelled._metadata) == [first, second]
    del first
    assert list(labelled._metadata) == [second]


def test_an_answer_beyond_the_releases_own_bound_is_not_sent(served: Served) -> None:
    class Large:
        def run(self, names: Any, fed: Any) -> Any:
            return [
                np.zeros(1, np.float32),
                np.zeros((1, 2), np.float16),
                np.zeros((1, 1000), np.int64),
                np.ones(1, bool),
            ]

    assert served.model is not None
    served.model._session = Large()
    answer = post(served)
    assert answer.status_code == 500
    assert "output row: the model made [1, 1000], and the release declares INT64 [batch, 1]" in answer.json()["error"]
    # Known before it is computed.
    wide = {"outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2**20]}]}
    signature = Signature.of({"inputs": [{"name": "x", "dtype": "bool", "shape": ["batch"]}], **wide})
    signature.require_small_answer(["y"], {"batch": 64})
    with pytest.raises(RequestError, match="expected to answer at most 268,435,456 bytes, and this asks for 272"):
        signature.require_small_answer(["y"], {"batch": 65})


# ---- how many at once


def test_one_request_too_many_is_told_to_come_again_and_health_is_answered_meanwhile(
    served: Served, held: Held
) -> None:
    async def crowd(client: Client) -> None:
        body = json.dumps(GOOD)
        waiting = [asyncio.create_task(client.post(INFER, content=body)) for _ in range(2)]
        while served.requests < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await client.post(INFER, content=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/digits"):
            assert (await client.get(path)).status_code == 200
        held.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await client.post(INFER, content=body)).status_code == 200

    with_client(served, crowd)


def test_who_hangs_up_leaves_nothing_in_the_queue(served: Served, held: Held) -> None:
    model = served.model
    assert model is not None
    inputs = parse(json.dumps(GOOD).encode(), None, model.signature).inputs

    async def come_and_go() -> None:
        first = asyncio.create_task(model.infer(inputs, ["row"]))
        await asyncio.sleep(0.01)
        for _ in range(100):
            other = asyncio.create_task(model.infer(inputs, ["row"]))
            await asyncio.sleep(0)
            other.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await other
        assert len(model._waiting) == 0
        held.go.set()
        assert (await first)[0].tolist() == [[90]]

    asyncio.run(come_and_go())


def test_a_model_that_hangs_is_not_ready(served: Served, held: Held) -> None:
    async def wait(client: Client) -> None:
        served.limits = replace(served.limits, compute_seconds=0.05)
        first = asyncio.create_task(client.post(INFER, content=json.dumps(GOOD)))
        await asyncio.sleep(0.2)
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/models/digits/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200
        held.go.set()
        await first
        assert (await client.get("/v2/health/ready")).status_code == 200

    with_client(served, wait)


# ---- who asks


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "rebound.example.com"}, 421),
        ({"Host": "127.0.0.1.example.com:8080"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://localhost.example.com"}, 403),
        ({"Content-Type": "text/plain", "Origin": "http://example.com"}, 403),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "API.example.org"}, 200),
        ({"Origin": "http://127.0.0.1:8080"}, 200),
        ({"Origin": "https://api.example.org"}, 200),
    ],
)
def test_no_page_of_another_site_has_anything_computed(
    served: Served, held: Held, headers: dict[str, str], status: int
) -> None:
    held.go.set()
    served.limits = replace(served.limits, hosts=("api.example.org",))
    answer = post(served, headers=headers)
    assert answer.status_code == status, answer.text
    assert held.calls == (status == 200)
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_browser_that_asks_whether_it_may_gets_no_leave(served: Served) -> None:
    asks = {"Origin": "http://127.0.0.1:8080", "Access-Control-Request-Method": "POST"}
    answer = with_client(served, lambda client: client.options(INFER, headers=asks))
    assert answer.status_code == 405 and not any(name.startswith("access-control") for name in answer.headers)


def test_nobody_who_reaches_the_port_changes_what_is_served(served: Served) -> None:
    async def try_all(client: Client) -> list[int]:
        paths = ("/v2/repository/models/digits/load", "/v2/repository/models/digits/unload", "/metrics", "/docs")
        return [(await client.post(path, json={})).status_code for path in paths]

    assert with_client(served, try_all) == [403, 403, 404, 404]

    async def watch(client: Client) -> list[int]:
        return [
            (await client.post(INFER, json=GOOD)).status_code,
            (await client.post("/v2/repository/models/digits/unload")).status_code,
            (await client.get("/metrics")).status_code,
            (await client.get("/v2/health/ready")).status_code,
            (await client.get("/metrics", headers={"Host": "rebound.example.com"})).status_code,
        ]

    assert with_client(served, watch, watching) == [404, 404, 200, 200, 421]


# ---- connections: of the real server


@pytest.fixture(scope="module")
def server(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        environment("serving", requirements())
    except ServiceError as error:
        pytest.skip(str(error))
    port = next(port for port in free_ports(50) if all(map(port_is_free, range(port, port + 3))))
    limits = Limits(
        requests=4, connections=8, head_seconds=1.5, silence_seconds=1.5, body_seconds=2.0, linger_seconds=0.3,
        url_bytes=1000, head_bytes=2000, bytes_at_once=2**26 + 2**20,
    )  # fmt: skip
    found = Server(folder=tmp_path_factory.mktemp("server"), model="digits", port=port, limits=limits)
    with contextlib.closing(found):
        found.load(release)
        yield found


def said(server: Server, *pieces: bytes, until_closed: bool = True) -> bytes:
    """What the server answers to these bytes before it closes the connection, which it has to do."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                # Each arrives by itself, until there is an answer.
                if len(pieces) > 1 and select.select([connection], [], [], 0.01)[0]:
                    break
            while until_closed and (part := connection.recv(65536)):
                answer += part
        return answer


HEAD = b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.timeout(300)
def test_connections_that_never_end_a_request_are_ended(server: Server) -> None:
    body = json.dumps(GOOD).encode()
    good = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert said(server, good).startswith(b"HTTP/1.1 200")
    for pieces, status in (
        ([b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"], b"414"),
        ([HEAD + b"X-A: " + b"a" * 3000 + b"\r\n\r\n"], b"431"),
        ([HEAD + b"A:\r\n" * 100 + b"\r\n"], b"431"),
        # One that never ends: no parser tells of it.
        ([HEAD + b"X-A: ", *[b"a" * 1000] * 5], b"431"),
        ([HEAD + b"X-A: a\r\n"], b"408"),
        ([b"\0\1\2\r\n\r\n"], b"400"),
        # Silent in the middle of a body, and a letter now and then.
        ([HEAD + b"Content-Length: 10\r\n\r\n{"], b"408"),
        ([HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 300], b"408"),
        ([HEAD + b"Content-Length: 99999999\r\n\r\n{"], b"413"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"2000\r\n" + b" " * 0x2000 + b"\r\n"] * 20], b"413"),
        # Behind the last piece of a body.
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\nX-A: ", *[b"a" * 1000] * 5], b"431"),
    ):
        assert said(server, *pieces).startswith(b"HTTP/1.1 " + status), pieces[0][:60]
    # Who says nothing at all.
    assert said(server) == b""
    # More connections than there are places, and all of them given back.
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert said(server, until_closed=True).startswith(b"HTTP/1.1 503")
    assert said(server, good).startswith(b"HTTP/1.1 200")
    assert "Traceback" not in server.log.read_text()


@pytest.mark.timeout(300)
def test_who_asks_for_labels_and_does_not_take_them_is_ended(server: Server, release: Release) -> None:
    # Longer than any that a reader takes, so that no buffer on the way holds them.
    manifest = replace(release.manifest, signature={**KINDS, "labels": ["x" * 2**24]})
    server.load(replace(release, generation=8, manifest=manifest))
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"GET /v2/models/digits HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(3)
            taken = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    taken += len(part)
        assert 0 < taken < 2**24
    finally:
        server.load(replace(release, generation=9))
    assert "Traceback" not in server.log.read_text()


# With the server's own packages: what each call comes to, as JSON.
ASK = """
import json, sys, grpc
from tritonclient.grpc import service_pb2 as messages, service_pb2_grpc as services
channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.max_metadata_size", 10**6)])
stub = services.GRPCInferenceServiceStub(channel)
def good(rows=1, outputs=()):
    request = messages.ModelInferRequest(model_name="digits")
    kinds = {"x": "FP32", "half": "FP16", "id": "INT64", "flag": "BOOL"}
    for name, kind in kinds.items():
        shape = [rows, 2] if name == "half" else [rows]
        request.inputs.add(name=name, datatype=kind, shape=shape)
    request.raw_input_contents.extend([b"\\0" * 4 * rows, b"\\0" * 4 * rows, b"\\0" * 8 * rows, b"\\0" * rows])
    for name in outputs:
        request.outputs.add(name=name)
    return request
def call(request, method=None):
    try:
        (method or stub.ModelInfer)(request, timeout=30)
        return "OK"
    except grpc.RpcError as error:
        assert len(error.details()) < 1100, len(error.details())
        return error.code().name
padded = good()
padded.parameters["a"].string_param = "a" * 200_000
long_id = good()
long_id.id = "i" * 5000
named = good()
named.model_name = "n" * 50_000
raw = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
huge = good()
huge.inputs[0].shape[0] = 2**62
print(json.dumps([
    call(good()), call(padded), call(good(9)), call(good(1, ["row"] * 500)), call(long_id), call(named), call(huge),
    call(b"\\xff\\xff", raw),
    call(messages.RepositoryModelLoadRequest(model_name="digits"), stub.RepositoryModelLoad),
    call(messages.RepositoryModelUnloadRequest(model_name="digits"), stub.RepositoryModelUnload),
    call(good()),
]))
calls = [stub.ModelInfer.future(good(8), timeout=30) for _ in range(200)]
codes = set()
for one in calls:
    codes.add(one.code().name)
print(json.dumps(sorted(codes)))
"""


@pytest.mark.timeout(300)
def test_grpc_has_the_same_limits(server: Server) -> None:
    python = environment("serving", requirements())
    done = subprocess.run([python, "-c", ASK, f"127.0.0.1:{server.port + 1}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one_by_one, together = map(json.loads, done.stdout.splitlines())
    wrong = "INVALID_ARGUMENT"
    assert one_by_one == [
        "OK", "RESOURCE_EXHAUSTED", wrong, wrong, wrong, "NOT_FOUND", "RESOURCE_EXHAUSTED", wrong,
        "PERMISSION_DENIED", "PERMISSION_DENIED", "OK",
    ]  # fmt: skip
    assert together in (["OK", "RESOURCE_EXHAUSTED"], ["OK"])


def varint(number: int) -> bytes:
    return b"" if not number else bytes([number & 127 | (128 if number > 127 else 0)]) + varint(number >> 7)


def field(key: int, content: bytes) -> bytes:
    return bytes([key << 3 | 2]) + (varint(len(content)) or b"\0") + content


KINDS_OF_INPUTS = {"x": ("FP32", 4, ()), "half": ("FP16", 2, (2,)), "id": ("INT64", 8, ()), "flag": ("BOOL", 1, ())}


def infer_message(labels: bool) -> bytes:
    """A ModelInferRequest of one row, as it goes over a stream."""
    body = field(1, b"digits")
    for name, (kind, _, more) in KINDS_OF_INPUTS.items():
        shape = b"".join(map(varint, (1, *more)))
        body += field(5, field(1, name.encode()) + field(2, kind.encode()) + field(3, shape))
    if labels:
        said = field(2, field(1, b"labels") + field(2, b"\x08\x01"))
        body += field(6, field(1, next(iter(KINDS["outputs"]))["name"].encode()) + said)
    for _, size, more in KINDS_OF_INPUTS.values():
        body += field(7, b"\0" * size * (2 if more else 1))
    return b"\0" + len(body).to_bytes(4, "big") + body


class Unreading:
    """A client of gRPC that takes nothing: the window of each stream is 0."""

    def __init__(self, server: Server, window: int = 0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port + 1), timeout=15)
        self.http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        codes = h2.settings.SettingCodes
        self.http2.local_settings = h2.settings.Settings(
            client=True, initial_values={codes.INITIAL_WINDOW_SIZE: window}
        )
        self.http2.initiate_connection()

    def ask(self, method: str, message: bytes, end: bool = True) -> int:
        stream = self.http2.get_next_available_stream_id()
        path = f"/inference.GRPCInferenceService/{method}"
        head = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost", "te": "trailers"}
        self.http2.send_headers(stream, [*head.items(), ("content-type", "application/grpc")])
        if message:
            self.http2.send_data(stream, message, end_stream=end)
        self.socket.sendall(self.http2.data_to_send())
        return stream

    def status(self, stream: int) -> str:
        """gRPC's number of how this call ended."""
        while True:
            data = self.socket.recv(65536)
            assert data, "closed"
            for event in self.http2.receive_data(data):
                if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                    found = {bytes(name): bytes(value).decode() for name, value in event.headers}
                    if event.stream_id == stream and b"grpc-status" in found:
                        return found[b"grpc-status"]
            self.socket.sendall(self.http2.data_to_send())

    def send(self, stream: int, size: int) -> int:
        """So many bytes of a message, as the windows allow, until the call is over; how many went."""
        sent, piece = 0, b"x" * 16384
        while sent < size:
            room = min(self.http2.local_flow_control_window(stream), len(piece), size - sent)
            if room > 0:
                self.http2.send_data(stream, piece[:room])
                self.socket.sendall(self.http2.data_to_send())
                sent += room
            if room <= 0 or select.select([self.socket], [], [], 0)[0]:
                for event in self.http2.receive_data(self.socket.recv(65536)):
                    if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                        return sent
                self.socket.sendall(self.http2.data_to_send())
        return sent

    def until_closed(self) -> float:
        """Seconds until the server closes it, with all that it asks of HTTP/2 answered."""
        began = time.monotonic()
        with self.socket, contextlib.suppress(ConnectionError):
            while data := self.socket.recv(65536):
                self.http2.receive_data(data)
                self.socket.sendall(self.http2.data_to_send())
        return time.monotonic() - began


@pytest.mark.timeout(300)
def test_answers_over_grpc_that_nobody_takes_are_counted_and_end_their_connection(
    server: Server, release: Release
) -> None:
    labels = {**KINDS, "labels": ["x" * 2**24]}
    server.load(replace(release, generation=10, manifest=replace(release.manifest, signature=labels)))
    try:
        ask = functools.partial(httpx.get, f"{server.url}/v2/models/digits", timeout=30)
        reply = ask()
        deadline = time.monotonic() + 60
        # A busy machine may be done with the first before it has the second one's answer, or hold one of ours, which
        # leaves no room for the second one.
        while reply.status_code == 200 and time.monotonic() < deadline:
            clients = [Unreading(server) for _ in range(4)]
            for client in clients[:2]:
                client.ask("ModelInfer", infer_message(labels=True))
            # Small ones, of any call: they hold a place.
            clients[2].ask("ServerLive", b"\0\0\0\0\0")
            clients[3].ask("ModelInfer", infer_message(labels=False))
            looked = time.monotonic() + 3
            while (reply := ask()).status_code == 200 and time.monotonic() < looked:
                time.sleep(0.02)
            if reply.status_code == 200:
                for client in clients:
                    client.socket.close()
                continue
            assert all(client.until_closed() < 10 for client in clients)
        assert reply.status_code == 429 and "requests and answers of 67,1" in reply.text
        assert ask().status_code == 200
    finally:
        server.load(replace(release, generation=11))
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.mark.timeout(300)
def test_what_is_not_wholly_received_over_grpc_is_counted_and_ended(server: Server) -> None:
    # Half of 65 MiB may be here of messages that have not come to their end; twice 4 of them.
    declared = b"\0" + (200 * 2**20).to_bytes(4, "big")
    client = Unreading(server, 2**16)
    assert client.send(client.ask("ModelInfer", declared, end=False), 190 * 2**20) < 150 * 2**20
    client.socket.close()
    # Headers and no more: an honest caller has a place, and who says nothing is ended in time.
    silent = Unreading(server, 2**16)
    streams = [silent.ask("ModelInfer", b"", end=False) for _ in range(20)]
    honest = Unreading(server, 2**16)
    assert honest.status(honest.ask("ModelInfer", infer_message(labels=False))) == "0"
    assert silent.status(streams[-1]) == "4"
    # A message of names has a length of names.
    named = field(1, b"n" * 10_000)
    stream = honest.ask("ModelReady", b"\0" + len(named).to_bytes(4, "big") + named)
    assert honest.status(stream) == "8"
    assert honest.status(honest.ask("ModelReady", b"\0\0\0\0\1\xff")) == "3"
    assert honest.status(honest.ask("ModelInfer", infer_message(labels=False))) == "0"
    for client in (silent, honest):
        client.socket.close()
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


# With the server's own packages: each number of each type comes back, and the length that is counted is the one sent.
TYPED = """
from types import SimpleNamespace as Of
import numpy as np
from shipreader import inference_grpc as served
from shipreader.inference_tensors import DATATYPES
for name in set(DATATYPES) - {"float16"}:
    values = [0, 1, 1, 0]
    if (kind := np.dtype(name)).kind in "iu":
        most = np.iinfo(kind)
        values += [x for bits in range(64) for x in (2**bits - 1, 2**bits, -2**bits) if most.min <= x <= most.max]
    model = Of(name="m", version="7", signature=Of(outputs={"y": Of(datatype=DATATYPES[name])}))
    for array in (np.array(values, kind), np.array([values], kind), np.zeros((0, 3), kind)):
        for binary in ((), ("y",)):
            asked = Of(id="a", binary=binary, outputs=["y"], said={"y": {"labels": "[]"}})
            encoded = served.reply(asked, [array], model)
            assert 0 <= len(encoded) - served.reply_bytes(asked, [array], model) < 80
            read = served.messages.ModelInferResponse.FromString(encoded)
            (item,), raw = read.outputs, list(read.raw_output_contents)
            assert (item.shape, item.parameters["labels"].string_param, read.id) == (list(array.shape), "[]", "a")
            found = getattr(item.contents, served._CONTENTS[DATATYPES[name]])
            assert raw == [array.tobytes()] if binary else found == array.ravel().tolist(), (name, array)
"""


def test_answers_over_grpc_are_counted_as_long_as_they_are_sent() -> None:
    try:
        python = environment("serving", requirements())
    except ServiceError as error:
        pytest.skip(str(error))
    done = subprocess.run([python, "-c", TYPED], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_large_answers_are_written_beside_the_loop_and_count_while_they_wait(served: Served) -> None:
    found: list[Any] = []
    asked: Any = Of(inputs={}, outputs=[], sizes={})

    async def infer(*_: object) -> list[Any]:
        return [np.zeros(40_000, np.int8), np.zeros(next(sizes), np.int8)]

    def render(*_: object) -> bytes:
        found.extend((threading.current_thread() is threading.main_thread(), served.bytes))
        return b""

    model: Any = Of(infer=infer, signature=Of(require_declared=lambda *_: None))
    served.limits = replace(served.limits, bytes_at_once=100_000)
    sizes = iter([1, 30_000, 30_000])
    for _ in range(2):
        asyncio.run(computed(model, asked, render, served.visit, Of(outputs=None)))  # type: ignore[arg-type]
    served.bytes = 40_000
    with pytest.raises(RequestError, match="at most 100,000 may be"):
        asyncio.run(computed(model, asked, render, served.visit, Of(outputs=None)))  # type: ignore[arg-type]
    assert found == [True, 0, False, 70_000]


@pytest.mark.parametrize("labels", [True, False])
def test_answers_over_http_count_until_they_are_taken(served: Served, labels: bool) -> None:
    counted: list[int] = []

    async def send(message: Any) -> None:
        counted.append(served.bytes)

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    body = {**GOOD, "outputs": [{"name": next(iter(KINDS["outputs"]))["name"], "parameters": {"labels": labels}}]}
    head = {"type": "http", "method": "POST", "path": INFER, "headers": [], "query_string": b"", "http_version": "1.1"}
    asyncio.run(
        application(served)({**head, "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}, receive, send)
    )
    assert min(counted) > 50 and served.bytes == 0
    # With no room left for it, it is not sent.
    served.bytes = 49_900
    assert post(served, {"inputs": GOOD["inputs"]}, headers={}).status_code == 429


def test_a_folder_of_a_release_needs_no_path_from_a_request(served: Served) -> None:
    async def go(client: Client) -> list[int]:
        names = ("..%2f..%2fetc%2fpasswd", "digits%2f..", "%00", "a" * 500)
        return [(await client.get(f"/v2/models/{name}")).status_code for name in names]

    assert with_client(served, go) == [404, 404, 404, 404]

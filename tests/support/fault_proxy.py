"""An HTTP proxy between a client and a real server, that breaks chosen requests the way networks and servers do.

    with FaultProxy("http://127.0.0.1:4566") as proxy:
        proxy.add(Rule(DropReply(), method="PUT", path="/channels/"))

The first rule that matches and is not used up decides what happens to a request; without one it is passed on as it
is. A new kind of fault is one more class with an `apply`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY


@dataclass(frozen=True)
class Request:
    """One request as the client sent it."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    cut: bool = False
    """Close the connection behind it, whatever the headers promised."""


Forward = Callable[[Request], Reply]


class Fault(Protocol):
    def apply(self, request: Request, forward: Forward) -> Reply | None:
        """The reply for the client; None closes the connection instead."""


@dataclass(frozen=True)
class PassOn:
    """No fault; useful with `before`, and to exempt the first few requests from a later rule."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        return forward(request)


@dataclass(frozen=True)
class Answer:
    """Answer with a fault instead of passing the request on."""

    status: int
    code: str
    message: str = "injected"

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        return fault_reply(self.status, self.code, self.message)


@dataclass(frozen=True)
class AnswerAfter:
    """Pass the request on, so that it happens, and answer with a fault."""

    status: int
    code: str

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        forward(request)
        return fault_reply(self.status, self.code)


@dataclass(frozen=True)
class DropRequest:
    """Close the connection without passing the request on."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        return None


@dataclass(frozen=True)
class DropReply:
    """Pass the request on, so that it happens, and close the connection without a reply."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        forward(request)
        return None


@dataclass(frozen=True)
class StripHeaders:
    """Pass the request on without these headers, as a server that does not know them would read it."""

    names: tuple[str, ...]
    """Lower case."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        kept = {name: value for name, value in request.headers.items() if name not in self.names}
        if kept != request.headers:
            request = signed(Request(request.method, request.path, kept, request.body))
        return forward(request)


@dataclass(frozen=True)
class Damage:
    """Pass the request on with the first byte of its body changed."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        return forward(Request(request.method, request.path, request.headers, _damaged(request.body)))


@dataclass(frozen=True)
class DamageReply:
    """Change the first byte of the reply's body."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        reply = forward(request)
        return Reply(reply.status, reply.headers, _damaged(reply.body))


@dataclass(frozen=True)
class ManyHeaders:
    """Answer with as many more headers as an object's metadata makes in a store that takes so many."""

    count: int = 130

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        reply = forward(request)
        more = [(f"x-amz-meta-{number:02x}", "") for number in range(self.count)]
        return Reply(reply.status, [*reply.headers, *more], reply.body)


@dataclass(frozen=True)
class OneHeader:
    """Answer with one more header."""

    name: str
    value: str

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        reply = forward(request)
        return Reply(reply.status, [*reply.headers, (self.name, self.value)], reply.body)


@dataclass(frozen=True)
class CutReply:
    """Let the request happen, and close the connection in the middle of the reply."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        reply = forward(request)
        if not reply.body or request.method == "HEAD":
            return None
        headers = [(name, value) for name, value in reply.headers if name.lower() != "content-length"]
        headers.append(("Content-Length", str(len(reply.body))))
        return Reply(reply.status, headers, reply.body[: len(reply.body) // 2], cut=True)


@dataclass(frozen=True)
class CutRequest:
    """Pass on the headers and half of the body, and close both connections."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        if request.body:
            # The server waits for the rest until the connection ends.
            headers = {**request.headers, "content-length": str(len(request.body))}
            with contextlib.suppress(OSError, http.client.HTTPException):
                forward(Request(request.method, request.path, headers, request.body[: len(request.body) // 2]))
        return None


@dataclass(frozen=True)
class Delay:
    """Pass the request on after some seconds."""

    seconds: float

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        time.sleep(self.seconds)
        return forward(request)


@dataclass(frozen=True)
class OtherBytes:
    """Answer with other bytes than the object's."""

    body: bytes
    encoding: str = "identity"

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        size = str(len(self.body))
        return Reply(200, [("ETag", '"1"'), ("Content-Encoding", self.encoding), ("Content-Length", size)], self.body)


@dataclass
class Rule:
    """Which requests a fault befalls."""

    fault: Fault
    method: str = ""
    """Empty: any."""
    path: str = ""
    """Regular expression, searched in path and query."""
    times: int | None = None
    """How often; None: always."""
    before: Callable[[], None] | None = None
    """Called before the fault, in the proxy's thread: what else happens in the world just then."""
    used: int = 0

    def matches(self, request: Request) -> bool:
        """Asked about every request that no earlier rule befell, in order of arrival."""
        return (
            (self.times is None or self.used < self.times)
            and self.method in ("", request.method)
            and re.search(self.path, request.path) is not None
        )


def _damaged(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:] if body else body


def signed(request: Request) -> Request:
    """The request signed again: to a server that checks signatures, what was changed is what the client asked for."""
    headers = {name: value for name, value in request.headers.items() if name not in _SIGNATURE}
    changed = AWSRequest(request.method, f"http://{headers['host']}{request.path}", headers, request.body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(changed)
    headers.update({name.lower(): value for name, value in changed.headers.items()})
    return Request(request.method, request.path, headers, request.body)


_SIGNATURE = frozenset(["authorization", "x-amz-date", "x-amz-content-sha256"])


@dataclass
class AtIndex(Rule):
    """The fault befalls one request by its place in the order of arrival, from 0, and `following` ones behind it."""

    index: int = 0
    following: int = 0
    seen: int = 0

    def matches(self, request: Request) -> bool:
        self.seen += 1
        return self.index < self.seen <= self.index + 1 + self.following


def fault_reply(status: int, code: str, message: str = "injected") -> Reply:
    """A reply as S3 servers write faults."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Reply(status, [("Content-Type", "application/xml")], body)


@dataclass
class FaultProxy:
    """Listens on a free loopback port while the context is open."""

    target: str
    """Address of the real server."""
    rules: list[Rule] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """Everything the client sent, in order of arrival."""
    _under_way: int = 0

    def __enter__(self) -> Self:
        address = urlsplit(self.target)
        assert address.hostname is not None and address.port is not None
        self._host, self._port = address.hostname, address.port
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self.rules.append(rule)
        return rule

    def settle(self) -> None:
        """Wait until nothing is under way any more, not even what a client has given up."""
        while self._under_way:
            time.sleep(0.005)

    def sent(self, method: str, path: str) -> list[Request]:
        """The requests with this method whose path matches the regular expression."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def handle(self, request: Request) -> Reply | None:
        with self._lock:
            self._under_way += 1
        try:
            return self._handle(request)
        finally:
            with self._lock:
                self._under_way -= 1

    def _handle(self, request: Request) -> Reply | None:
        with self._lock:
            self.requests.append(request)
            rule = next((rule for rule in self.rules if rule.matches(request)), None)
            if rule is not None:
                rule.used += 1
        if rule is None:
            return self._forward(request)
        if rule.before is not None:
            rule.before()
        return rule.fault.apply(request, self._forward)

    def _forward(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        try:
            # The Host header stays the client's: it is part of what an S3 client signs.
            connection.request(request.method, request.path, body=request.body or None, headers=request.headers)
            if len(request.body) < int(request.headers.get("content-length", 0)):
                assert connection.sock is not None
                connection.sock.shutdown(socket.SHUT_WR)
            reply = connection.getresponse()
            return Reply(reply.status, reply.getheaders(), reply.read())
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The usual 5 makes the sixth client that connects at once wait a second.
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, because it was killed or did not wait, is what these tests are about."""


_HOP_BY_HOP = frozenset(["connection", "keep-alive", "transfer-encoding", "expect", "date", "server"])


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body leave in two writes; without this the second waits for the client's acknowledgement.
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            assert "transfer-encoding" not in self.headers, "chunked requests are not supported"
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            kept = {name: value for name, value in headers.items() if name not in _HOP_BY_HOP}
            try:
                reply = proxy.handle(Request(self.command, self.path, kept, body))
            except OSError:
                # The real server is gone: so are we, to this client.
                reply = None
            if reply is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(reply.status)
            names = {name.lower() for name, _ in reply.headers}
            for name, value in reply.headers:
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            if "content-length" not in names:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
            if reply.cut:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = _serve

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler

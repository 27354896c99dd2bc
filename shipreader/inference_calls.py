"""What gRPC leaves open on a connection: messages that do not come to their end, and answers that nobody takes.

Its core receives a message whole, of whatever length it may have, and keeps an answer while its stream is open; it
tells nobody how far either is, and ends none by itself. The kernel knows what has come and gone, by connection. It
imports grpc.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from shipreader.inference_served import Served
from shipreader.inference_tensors import RequestError

CODES = {
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""By HTTP's status; INVALID_ARGUMENT for every other one."""
LOOK_SECONDS = 1.0
"""After an answer was made it is looked for the first time whether it was taken: almost all are."""
COUNT_SECONDS = 0.1
"""Between two looks at what has come of messages that are not here yet."""
LEAST_MOVED = 2**14
"""Bytes that a connection has to bring, or to take, between two looks: pings, and their answers, are neither."""
TCP_ACKED = 120
"""Where the kernel's struct tcp_info has the bytes that the other side has taken, and those that it has sent: 64 bits
each (Linux 4.2 and newer)."""


class Connections:
    """This process's own on a port, by what gRPC calls their other ends, such as ipv4:127.0.0.1:51234."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._places: dict[str, int] = {}
        """Descriptors, as far as they are known; they may be others by now."""

    def moved(self, peer: str) -> tuple[int, int] | None:
        """Bytes that the other side has taken, and has sent, since it is there; None where it is gone."""
        with self._borrowed(peer) as connection:
            if connection is None:
                return None
            said = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            return struct.unpack_from("QQ", said, TCP_ACKED)

    def end(self, peer: str) -> None:
        """End it, with all of its calls."""
        with self._borrowed(peer) as connection, suppress(OSError):
            if connection is not None:
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _borrowed(self, peer: str) -> Iterator[socket.socket | None]:
        with ExitStack() as stack:
            found = self._at(self._places.get(peer, -1), peer)
            if found is None:
                # gRPC tells nobody which one it is. Once for each connection.
                self._look_for_all()
                found = self._at(self._places.get(peer, -1), peer)
            if found is not None:
                stack.enter_context(found)
            yield found

    def _at(self, place: int, peer: str) -> socket.socket | None:
        """A copy, so that it is no other one while it is used."""
        if place < 0:
            return None
        with suppress(OSError), ExitStack() as stack:
            # The longer address has room for both; finding out which would ask the kernel three times.
            found = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, os.dup(place)))
            if self._name(found) == peer:
                stack.pop_all()
                return found
        return None

    def _look_for_all(self) -> None:
        self._places.clear()
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                if not str(entry.readlink()).startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(entry.name))) as found:
                    if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == self._port:
                        self._places[self._name(found)] = int(entry.name)

    @staticmethod
    def _name(connection: socket.socket) -> str:
        host, port = connection.getpeername()[:2]
        return f"ipv4:{host.removeprefix('::ffff:')}:{port}"


@dataclass(eq=False)
class _Call:
    """One whose message is not here yet."""

    context: Any
    began: float
    before: int
    """Bytes that its connection had brought when it began."""
    others: int = 0
    """Bytes of messages that began later and are here."""


@dataclass(eq=False)
class _Incoming:
    """A connection with such calls."""

    due: float
    """When it has to have brought something."""
    before: int
    """Bytes that it had brought when that was looked at last."""
    calls: dict[_Call, None] = field(default_factory=dict)
    """The oldest one first."""


class Receiving:
    """Receives the messages of calls. Used in the event loop.

    What has come of those that are not here yet counts in the server's bytes, of which it may be half. Beyond it the
    connection that has brought most loses its calls. So does one that brings nothing, and of more calls than may be
    the fullest connection loses its oldest one.
    """

    def __init__(self, served: Served, connections: Connections) -> None:
        self._served, self._limits, self._connections = served, served.limits, connections
        self._incoming: dict[str, _Incoming] = {}
        self._calls = 0
        self._visit = served.visit()
        self._timer: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def message(self, context: Any) -> bytes:
        """A call's message, encoded.

        Raises RequestError where there is none, and gRPC's own error for a call that was ended meanwhile.
        """
        loop, peer = asyncio.get_running_loop(), context.peer()
        if self._calls >= 2 * self._limits.requests:
            self._make_room()
        now, came = loop.time(), self._came(peer)
        incoming = self._incoming.get(peer)
        if incoming is None:
            incoming = self._incoming[peer] = _Incoming(now + self._limits.silence_seconds, came)
        call = _Call(context, now, came)
        incoming.calls[call] = None
        self._calls += 1
        if self._timer is None:
            self._timer = loop.call_later(COUNT_SECONDS, self._look)
        size = 0
        try:
            encoded = await context.read()
            if encoded is grpc.aio.EOF:
                raise RequestError("expected a message, got none")
            size = len(encoded)
        finally:
            self._forget(peer, incoming, call, size)
        return bytes(encoded)

    def _came(self, peer: str) -> int:
        moved = self._connections.moved(peer)
        return moved[1] if moved is not None else 0

    def _forget(self, peer: str, incoming: _Incoming, call: _Call, size: int) -> None:
        if call not in incoming.calls:
            return
        for older in incoming.calls:
            if older is call:
                break
            older.others += size
        del incoming.calls[call]
        self._calls -= 1
        if not incoming.calls:
            self._incoming.pop(peer, None)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now, limits = loop.time(), self._limits
        sizes: dict[str, int] = {}
        for peer, incoming in list(self._incoming.items()):
            oldest, came = next(iter(incoming.calls)), self._came(peer)
            sizes[peer] = max(came - oldest.before - oldest.others, 0)
            late = [call for call in incoming.calls if now > call.began + limits.body_seconds]
            if now > incoming.due:
                if came < incoming.before + LEAST_MOVED:
                    late += [call for call in incoming.calls if now > call.began + limits.silence_seconds]
                incoming.due, incoming.before = now + limits.silence_seconds, came
            if late:
                words = (
                    f"expected the whole request within {limits.body_seconds:g} s, and {LEAST_MOVED:,} bytes each "
                    f"{limits.silence_seconds:g} s"
                )
                self._refuse(peer, late, 408, words)
        self._visit.end()
        self._visit = self._served.visit()
        total, room = sum(sizes.values()), limits.bytes_at_once
        room = max(min(room // 2, room - self._served.bytes), 0)
        while total > room:
            most = max(sizes, key=lambda peer: sizes[peer])
            total -= sizes.pop(most)
            words = f"{room:,} bytes of requests that have not come to their end may be here; try again"
            if most in self._incoming:
                self._refuse(most, list(self._incoming[most].calls), 429, words)
        self._visit.hold(total)
        if self._incoming or total:
            self._timer = loop.call_later(COUNT_SECONDS, self._look)

    def _make_room(self) -> None:
        peer, fullest = max(self._incoming.items(), key=lambda item: len(item[1].calls))
        words = (
            f"{self._calls} requests have not come to their end, and this is the oldest of its connection; try again"
        )
        self._refuse(peer, [next(iter(fullest.calls))], 429, words)

    def _refuse(self, peer: str, calls: list[_Call], status: int, words: str) -> None:
        incoming = self._incoming[peer]
        for call in dict.fromkeys(calls):
            self._forget(peer, incoming, call, 0)
            # It ends what waits for the message too: to cancel that would leave the core with memory that is gone.
            task = asyncio.get_running_loop().create_task(self._abort(call.context, CODES[status], words))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _abort(self, context: Any, code: Any, words: str) -> None:
        end_unless_taken(context, self._connections, self._served)
        with suppress(Exception):
            await context.abort(code, words)


def end_unless_taken(context: Any, connections: Connections, served: Served) -> None:
    """Look again and again until the call is done; end its connection when that takes nothing, or takes too long."""
    loop, limits, peer = asyncio.get_running_loop(), served.limits, context.peer()
    timer: asyncio.TimerHandle

    def look(before: int | None, waited: float) -> None:
        nonlocal timer
        moved = connections.moved(peer)
        if moved is None:
            return
        taken = moved[0]
        if before is not None and (taken < before + LEAST_MOVED or waited >= limits.body_seconds):
            connections.end(peer)
            return
        timer = loop.call_later(limits.silence_seconds, look, taken, waited + limits.silence_seconds)

    timer = loop.call_later(min(LOOK_SECONDS, limits.silence_seconds), look, None, 0.0)
    context.add_done_callback(lambda _: timer.cancel())

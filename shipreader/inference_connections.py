"""What uvicorn leaves open on a connection: how many there are, how long headers may be and take, who never reads.

With httptools it bounds none of it, nor how long a body takes; its length is bounded where it is read
(shipreader/inference_http.py). It imports uvicorn, and nothing else from outside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shipreader.inference_limits import Limits

MOST_HEADERS = 100


class TooLongError(Exception):
    """Raised inside the parser, which ends the connection."""


def bounded(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits, as `uvicorn.Config(http=…)` takes it."""

    class Bounded(HttpToolsProtocol):
        _heading = False
        """Between the first byte of a request and the end of its headers."""
        _moved = False
        """Whether the last bytes completed headers or brought some of a body."""
        _unmoved = 0
        """Bytes since they did."""
        _taken = 0
        """Bytes that are looked at now."""
        _body_ends = 0.0
        """By the loop's clock: when the body of this request has to be here."""
        _refusal: tuple[HTTPStatus, str] | None = None
        _over = False
        """Refused: nothing that comes is looked at any more."""
        _waiting: asyncio.TimerHandle | None = None
        """Until who is connected has to have sent something."""
        _unread: asyncio.TimerHandle | None = None
        """Until it has to have taken something."""

        # ---- how many, and how long they may take

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{limits.connections} connections are open already")
                self._end()
            else:
                self._wait(limits.head_seconds, self._no_headers)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._waiting, self._unread):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._over or self.transport.is_closing():
                return
            self._moved, self._taken = False, len(data)
            super().data_received(data)
            if self._over or self.transport.is_closing():
                return
            self._unmoved = 0 if self._moved else self._unmoved + len(data)
            cycle = self.cycle
            # A header that never ends is seen by nobody else: the parser keeps it, and tells of complete ones.
            if self._unmoved > limits.head_bytes + limits.url_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._words())
            elif self._heading or cycle is None or (cycle.response_complete and not cycle.more_body):
                if self._waiting is None:
                    self._wait(limits.head_seconds, self._no_headers)
            elif cycle.more_body and not cycle.response_complete:
                now = self.loop.time()
                self._body_ends = self._body_ends or now + limits.body_seconds
                self._wait(min(limits.silence_seconds, max(self._body_ends - now, 0)), self._no_body)

        def _no_body(self) -> None:
            if self.cycle.more_body and not self.cycle.response_complete:
                words = (
                    f"expected the whole request within {limits.body_seconds:g} s, without a silence of "
                    f"{limits.silence_seconds:g} s"
                )
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, words)

        def _no_headers(self) -> None:
            if self._heading:
                self._refuse(
                    HTTPStatus.REQUEST_TIMEOUT, f"expected the headers of a request within {limits.head_seconds:g} s"
                )
            else:
                self._end()

        def _wait(self, seconds: float, call: Callable[[], None]) -> None:
            self._stop()
            self._waiting = self.loop.call_later(seconds, call)

        def _stop(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        # ---- how long headers are

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._heading, self._body_ends = True, 0.0

        def on_headers_complete(self) -> None:
            self._heading, self._moved = False, True
            self._stop()
            if len(self.url) > limits.url_bytes:
                words = f"expected an address of at most {limits.url_bytes:,} bytes"
                self._refusal = (HTTPStatus.REQUEST_URI_TOO_LONG, words)
                raise TooLongError
            # Seldom looked at: no more has come.
            if len(self.headers) > MOST_HEADERS or self._unmoved + self._taken > limits.head_bytes:
                size = sum(len(name) + len(value) for name, value in self.headers)
                if len(self.headers) > MOST_HEADERS or size > limits.head_bytes:
                    self._refusal = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._words())
                    raise TooLongError
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._moved = True
            super().on_body(body)

        def _words(self) -> str:
            return f"expected at most {MOST_HEADERS} headers of at most {limits.head_bytes:,} bytes"

        def send_400_response(self, msg: str) -> None:
            """Called for what the parser does not take, and where it was stopped."""
            self._refuse(*(self._refusal or (HTTPStatus.BAD_REQUEST, msg)))

        def _refuse(self, status: HTTPStatus, words: str) -> None:
            body = json.dumps({"error": words}).encode()
            retry = "retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self._over = True
            if self.cycle is not None and not self.cycle.response_complete:
                # What reads its body is not kept waiting.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            # Closed while it still sends, the other side would lose the answer.
            self._wait(limits.linger_seconds, self._end)

        # ---- an answer, and after it

        def pause_writing(self) -> None:
            super().pause_writing()
            # There is an answer that does not end before it is taken.
            self._watch_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_reading()
            if not self.transport.is_closing() and self.cycle.response_complete and self.cycle.more_body:
                # Refused before it was read. What still comes is thrown away, but not for ever.
                self._wait(limits.linger_seconds, self._end)

        def on_message_complete(self) -> None:
            self._moved = True
            super().on_message_complete()
            if self._body_ends and not self.cycle.response_complete:
                self._stop()
            if self.cycle.response_complete and self.cycle.more_body:
                # It came to its end all the same: the connection may be used again.
                self.cycle.more_body = False
                self._wait(limits.head_seconds, self._no_headers)

        def _end(self) -> None:
            """Close it when what was said is taken."""
            self._stop()
            self._watch_reading()
            self.transport.close()

        def _watch_reading(self) -> None:
            left = self.transport.get_write_buffer_size()
            if left and self._unread is None:
                self._unread = self.loop.call_later(limits.silence_seconds, self._still_unread, left, 0.0)

        def _still_unread(self, before: int, waited: float) -> None:
            """Again and again while an answer is not taken: end the connection when nothing moves."""
            self._unread = None
            left = self.transport.get_write_buffer_size()
            waited += limits.silence_seconds
            if left and (left == before or waited > limits.body_seconds):
                self.transport.abort()
            elif left:
                self._unread = self.loop.call_later(limits.silence_seconds, self._still_unread, left, waited)

    return Bounded

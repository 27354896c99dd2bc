"""Who may ask a server of this machine at all: programs, and pages that it has served itself; no other web page.

A browser sends requests to 127.0.0.1 for every page that asks it to. It says which page that is (`Origin`), and which
name the server was called by (`Host`), which is another one when a name of the internet was pointed at this machine.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
"""An ASGI application."""

# Any port: a tunnel (`ssh -L`) may have another one at this end.
_HOST = re.compile(rb"(?:127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
_ORIGIN = re.compile(rb"http://(?:127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)


def foreign(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Why a request is not for this server, by its headers; empty when it is."""
    hosts, origins = [], []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"origin":
            origins.append(value)
    host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if host is None:
        return "expected a request to 127.0.0.1 or localhost, got another Host"
    for origin in origins:
        page = _ORIGIN.fullmatch(origin)
        # Another server of this machine is another origin too.
        if page is None or page[1] != host[1]:
            return "expected a page of this server to ask, got another Origin"
    return ""


async def refuse(
    scope: Message, receive: Receive, send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer a request without asking the application.

    Args:
        scope: of the request; of a WebSocket no more is said than that it is refused.
        receive: of the request.
        send: of the request.
        status: of HTTP.
        body: text.
        headers: besides its length.
    """
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


class OwnPages:
    """An application that answers programs and its own pages, and refuses everything else with 403."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "lifespan" and (why := foreign(scope["headers"])):
            await refuse(scope, receive, send, 403, why.encode(), [(b"content-type", b"text/plain")])
            return
        await self.app(scope, receive, send)

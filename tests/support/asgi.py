"""Requests to an ASGI application in this process, as a server would hand them over."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    """What the application sent back."""

    status: int
    headers: dict[str, str]
    body: bytes


def asked(app: Any, method: str = "GET", target: str = "/", headers: Mapping[str, str] | None = None) -> Answered:
    """Ask it once. target: encoded path and query; headers: also Host, which is that of this machine by default."""
    path, _, query = target.partition("?")
    sent: list[dict[str, Any]] = []
    given = {"host": "127.0.0.1:1234", **{name.lower(): value for name, value in (headers or {}).items()}}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    start, *bodies = sent
    return Answered(
        start["status"],
        {name.decode().lower(): value.decode() for name, value in start["headers"]},
        b"".join(message["body"] for message in bodies),
    )


async def welcoming(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers everybody, and invites pages of every origin, as MiniStack does."""
    headers = [(b"access-control-allow-origin", b"*"), (b"etag", b'"1"')]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"secrets"})

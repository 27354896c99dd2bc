"""The S3 server of the local stack: MiniStack, which has no users, behind a check of signatures."""

from __future__ import annotations

import importlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from train_and_ship.infra.doors.guard import App, Message, OwnPages, Receive, Send, refuse
from train_and_ship.infra.doors.sigv4 import RefusedError, Request, check
from train_and_ship.infra.password import USER, read_password

HEALTH = "/_ministack/health"
"""Says that it answers, to whoever asks."""
MANAGEMENT = "/_"
"""Begins what is about the server itself: one of these deletes everything. No bucket has such a name."""


class Signed:
    """An S3 server that answers those who know key and secret, and no page of a browser but by a signed address."""

    def __init__(self, app: App, key: str, secret: str) -> None:
        self.app, self._key, self._secret = app, key, secret

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RefusedError as error:
                xml = _as_s3_says_it(error, scope["path"])
                await refuse(scope, receive, send, error.status, xml, [(b"content-type", b"application/xml")])
                return
        elif scope["type"] != "lifespan":
            await refuse(scope, receive, send, 403, b"")
            return

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # MiniStack invites every page of every origin.
                kept = [item for item in message["headers"] if not item[0].lower().startswith(b"access-control-")]
                message["headers"] = kept
            await send(message)

        await self.app(scope, receive, closed)

    def _check(self, scope: Message) -> None:
        if scope["path"].startswith(MANAGEMENT):
            if scope["path"] == HEALTH and scope["method"] == "GET":
                return
            raise RefusedError("AccessDenied", "Access Denied")
        request = Request(
            method=scope["method"],
            path=scope["raw_path"],
            query=scope["query_string"],
            headers=scope["headers"],
        )
        check(request, self._key, self._secret, datetime.now(UTC))


def _as_s3_says_it(error: RefusedError, path: str) -> bytes:
    parts = {"Code": error.code, "Message": str(error), "Resource": path, "RequestId": "ship"}
    # What is no character of XML goes, whoever sent it.
    shown = {name: escape("".join(letter for letter in text if letter.isprintable())) for name, text in parts.items()}
    lines = "".join(f"<{name}>{text}</{name}>" for name, text in shown.items())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{lines}</Error>'.encode("utf-8", "replace")


def main() -> None:
    """MiniStack's own command, as its variables say, behind the check."""
    home = Path(os.environ["SHIP_HOME"])
    if (password := read_password(home)) is None:
        sys.exit(f"expected the password of the local stack in {home}: `ship up` makes it")
    # MiniStack checks signed addresses by itself, and no other requests: with the same secret.
    os.environ.update(AWS_ACCESS_KEY_ID=USER, AWS_SECRET_ACCESS_KEY=password)
    # An extra, which need not be there where the bucket is somebody else's.
    server: Any = importlib.import_module("ministack.app")
    server.app = OwnPages(Signed(server.app, USER, password))
    server.main()


if __name__ == "__main__":
    main()

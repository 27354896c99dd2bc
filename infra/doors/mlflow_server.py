"""The MLflow server of the local stack, behind a password: MLflow's own application in one of ours (`--app-name`).

MLflow's own app with passwords (basic-auth) has accounts and permissions in a database, which it asks several times for
each request, and makes a slow hash of the password each time; here is one person with one random password.
"""

from __future__ import annotations

import base64
import hmac
import os
from pathlib import Path

from train_and_ship.infra.doors.guard import App, Message, OwnPages, Receive, Send, refuse
from train_and_ship.infra.password import USER, read_password

HEALTH = "/health"
"""Says that it answers, to whoever asks."""


class Asking:
    """An application that answers those who know user and password (HTTP basic authentication)."""

    def __init__(self, app: App, user: str, password: str) -> None:
        self.app = app
        self._expected = base64.b64encode(f"{user}:{password}".encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "lifespan" or self._is_known(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b'Basic realm="mlflow", charset="UTF-8"')]
        body = f"expected the user {USER} and the password that `ship password` prints".encode()
        await refuse(scope, receive, send, 401, body, headers)

    def _is_known(self, scope: Message) -> bool:
        if scope["type"] == "http" and scope["path"] == HEALTH and scope["method"] == "GET":
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, account = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Takes as long for a password that is nearly right as for any other.
        return hmac.compare_digest(account.strip(), self._expected) and kind.lower() == b"basic"


def create_app() -> App:
    """MLflow's own application behind the guard and the password. Raises RuntimeError when there is no password."""
    home = Path(os.environ["SHIP_HOME"])
    if (password := read_password(home)) is None:
        raise RuntimeError(f"expected the password of the local stack in {home}: `ship up` makes it")
    from mlflow.server.fastapi_app import app

    return OwnPages(Asking(app, USER, password))

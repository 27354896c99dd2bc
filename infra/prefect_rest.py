"""Prefect's REST API, for what has no time to import Prefect: one call at a time, with the server's password if set."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any

import httpx

from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.password import require_own_server
from train_and_ship.infra.settings import PREFECT_ACCOUNT, Settings

ANSWER_SECONDS = 10
BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
"""Nothing was done, ask again: so a server answers whose database is locked, as after a start under load. Prefect's own
client does that too."""
PATIENCE = 6
"""How often a server is asked whether it is there: a minute, as Prefect's client waits. Prefect 3.8.8 was
seen to hold its database for a minute between two runs, and not to answer within ten seconds."""
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try."""


def prefect_api(
    settings: Settings, method: str, path: str, body: Mapping[str, Any] | None = None, *, tries: int = 1
) -> httpx.Response:
    """One call to the Prefect server that the settings name.

    Args:
        settings: where it is.
        method: such as GET.
        path: below its API's address.
        body: sent as JSON.
        tries: how often a server is asked that takes the request and does not answer in time, as one that has just
            started beside much else; more than once only where it does no harm to repeat it.

    Returns:
        The reply, whatever its status.

    Raises:
        ServiceError: it does not answer.
        SettingsError: it wants another password, or is the one of another user at the port of the local one.
    """
    if settings.prefect_account_at(settings.prefect_api_url):
        require_own_server(settings.home, settings.prefect_api_url)
    account = settings.prefect_account
    user, _, password = account.partition(":")

    def ask() -> httpx.Response:
        return http_client(not settings.prefect_is_local).request(
            method,
            settings.prefect_api_url + path,
            json=dict(body) if body is not None else None,
            auth=(user, password) if account else None,
            timeout=ANSWER_SECONDS,
        )

    def ask_in_time() -> httpx.Response:
        for _ in range(tries - 1):
            with contextlib.suppress(httpx.ReadTimeout):
                return ask()
        return ask()

    try:
        reply = ask_in_time()
        for pause in PAUSES:
            if reply.status_code not in BUSY:
                break
            time.sleep(pause)
            reply = ask_in_time()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceError(
            f"Prefect: expected a server at {settings.prefect_api_url}, got {type(error).__name__}: {error}. "
            "`ship up` starts a local one; PREFECT_API_URL names another"
        ) from error
    if reply.status_code == httpx.codes.UNAUTHORIZED and settings.prefect_is_local:
        raise SettingsError(
            f"the Prefect server at {settings.prefect_api_url} has another password than {settings.home}: is it the "
            "stack of another SHIP_HOME? Else run `ship down` and `ship up`"
        )
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise SettingsError(
            f"environment variable {PREFECT_ACCOUNT}: expected the user:password of the Prefect server at "
            f"{settings.prefect_api_url}, got {'another one' if account else 'nothing'}"
        )
    return reply


def require_prefect(settings: Settings) -> None:
    """Raises ServiceError or SettingsError unless the server answers these settings."""
    # Unlike /health this one asks for the password.
    reply = prefect_api(settings, "GET", "/admin/version", tries=PATIENCE)
    if not reply.is_success:
        raise ServiceError(
            f"Prefect: expected a server at {settings.prefect_api_url}, and it answers {reply.status_code}; "
            "`ship up` starts a local one; PREFECT_API_URL names another"
        )


@functools.cache
def http_client(trust_env: bool) -> httpx.Client:
    """trust_env: whether the person's proxies are asked, which must not happen for servers of this machine."""
    # One for all: a new client loads the TLS certificates each time, and health is asked for many times a second.
    # Connections are not kept: a server that was restarted meanwhile would look dead once.
    return httpx.Client(trust_env=trust_env, limits=httpx.Limits(max_keepalive_connections=0))

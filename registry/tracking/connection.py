"""The connection to MLflow: its import, its client, and its errors as ours.

The files of this room are the only ones that import mlflow, and only inside functions, because the import costs more
than a second: call `import_mlflow` in a thread while something else is busy.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from train_and_ship.infra import addresses
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.password import require_own_server
from train_and_ship.infra.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

MISSING, EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
"""Codes of MLflow's errors."""
_ENVIRONMENT_DEFAULTS = {
    # mlflow's own default is 7 retries over more than two minutes. These give up about 8 s after a server has
    # gone, yet outlast its restart.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0.3",
    # Otherwise every finished run costs one more request and prints two lines.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Usage statistics are sent to the makers of mlflow unless somebody asks for that.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class AwayError(ServiceError):
    """A server that does not answer now, and may in an hour; not an address at which there can be none."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        """retryable: False when it was waited for."""
        super().__init__(message)
        self.retryable = retryable


def check_reachable(tracking_uri: str) -> None:
    """Ask the server for its health, within 3 s and without importing mlflow.

    Raises ServiceError, and AwayError where it may be there later. A tracking URI that is no web address (a database)
    has nothing to ask.
    """
    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        return
    # Not above: a rollback imports this module and asks nothing here.
    import httpx

    shown = without_credentials(tracking_uri)
    try:
        answer = httpx.get(
            f"{tracking_uri.rstrip('/')}/health",
            timeout=httpx.Timeout(2, connect=1),
            verify=tls_verification(),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        kind = ServiceError if _is_wrong(error) else AwayError
        raise kind(
            f"MLflow at {shown} does not answer ({reason}). Start it with `ship up`, or set MLFLOW_TRACKING_URI."
        ) from error
    if answer.status_code in (502, 503, 504):
        raise AwayError(f"MLflow at {shown} does not answer: what stands before it says {answer.status_code}.")
    if answer.status_code != httpx.codes.OK:
        raise ServiceError(
            f"expected MLflow at {shown}, got status {answer.status_code} from {shown}/health. "
            "Is another program listening there? Set MLFLOW_TRACKING_URI or SHIP_MLFLOW_PORT."
        )


def _is_wrong(error: Exception) -> bool:
    """Whether no server can be at the address: it is none, or no name."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return True
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__ in ("InvalidURL", "UnsupportedProtocol")


def import_mlflow() -> None:
    """Import mlflow (1 to 2 s), with settings that suit a program that nobody watches."""
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.models
    import mlflow.types  # noqa: F401


def connect(tracking_uri: str) -> MlflowClient:
    """A client of its own for each call, so that mlflow's global state stays the caller's."""
    log_in(tracking_uri)
    import_mlflow()
    import mlflow
    from mlflow import MlflowClient

    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        # Used without a server, the registry asks the global tracking store about the model.
        mlflow.set_tracking_uri(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri)


_before: dict[str, str | None] = {}
"""The person's own variables, while those of the local server are in their place."""


def log_in(tracking_uri: str) -> None:
    """Let mlflow into the local server, if that is what the address names; it reads variables at each request.

    For any other address they are the person's own again: nobody else is sent the password of the local server.
    """
    settings = Settings.load()
    variables = settings.mlflow_variables_at(tracking_uri)
    if variables:
        require_own_server(settings.home, tracking_uri)
    for name, value in variables.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value
    for name in _before.keys() - variables.keys():
        own = _before.pop(name)
        if own is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = own


@contextlib.contextmanager
def translated(action: str, tracking_uri: str) -> Iterator[None]:
    """Turn what mlflow raises into our errors: AwayError for a server that is away. ValueError and the like are our own
    bugs and pass."""
    import_mlflow()
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        shown = without_credentials(tracking_uri)
        try:
            check_reachable(tracking_uri)
        except ServiceError as unreachable:
            raise type(unreachable)(f"{action}: {unreachable}") from error
        reason = str(error).partition("\n")[0]
        if getattr(error, "error_code", "") in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise SettingsError(
                f"{action}: MLflow at {shown} denied access ({reason}); "
                "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        raise ServiceError(f"{action}: MLflow at {shown} answered: {reason}") from error


@contextlib.contextmanager
def passing_over(code: str) -> Iterator[None]:
    """Let the block end where MLflow answers with this error code; within `translated`, which sees all others."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def without_credentials(uri: str) -> str:
    """An address as messages may show it; of a database no more than its kind."""
    scheme = urlsplit(uri).scheme
    if scheme not in ("http", "https"):
        return scheme or uri
    return addresses.without_credentials(uri)


def tls_verification() -> bool | ssl.SSLContext:
    """The same certificates that mlflow trusts."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return False
    bundle = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("REQUESTS_CA_BUNDLE")
    if not bundle:
        return True
    return ssl.create_default_context(cafile=bundle)


def key(name: str) -> str:
    """MLflow refuses other characters in the names of metrics and params, and longer names."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def milliseconds(seconds: float) -> int:
    """Seconds as MLflow counts them."""
    return int(seconds * 1000)


def user() -> str:
    """The name of this process's account."""
    # A container may run under a number that has no name.
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return "unknown"

"""What promotion and rollback want of MLflow's model registry: aliases, tags, and which version holds which release.

Over MLflow's REST API, because importing mlflow takes longer than a whole rollback, and with urllib3, because boto3 has
loaded it already. Where there is no plain server (a database as tracking URI, Databricks, workspaces) mlflow's own
client answers the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from train_and_ship.infra.errors import AnsweredError, ServiceError, SettingsError
from train_and_ship.infra.password import require_own_server
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.tracking.connection import (
    MISSING,
    connect,
    passing_over,
    tls_verification,
    translated,
    without_credentials,
)

CONNECT_SECONDS, READ_SECONDS = 1.0, 10.0
REPLY_BYTES = 16 * 2**20
"""Of a reply, unpacked: a hundred versions with all that we write of them are a tenth of it."""
TAG_RELEASE = "release"
"""Tag of a version: the id of the release it holds."""


class ModelRegistry(Protocol):
    """All methods raise SettingsError when MLflow denies access, ServiceError when it does not do what was asked."""

    def aliases(self, model: str) -> Mapping[str, str]:
        """Alias to version; empty when there is no such model."""

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Point an alias at a version in one step, without a moment in which there is none. Writes to MLflow."""

    def versions(self, model: str, release: str) -> list[str]:
        """Versions that hold a release, the newest first."""

    def release(self, model: str, version: str) -> str | None:
        """The release that a version holds; None when there is no such version, or it holds none of ours."""

    def set_tag(self, model: str, version: str, name: str, value: str) -> None:
        """Writes to MLflow.

        Args:
            model: the registered model.
            version: which one.
            name: of the tag.
            value: of the tag.
        """

    def delete_version(self, model: str, version: str) -> None:
        """Writes to MLflow. A version that is gone already is no error."""


def model_registry(tracking_uri: str) -> ModelRegistry:
    """The registry behind a tracking URI. Opens no connection."""
    plain = urlsplit(tracking_uri).scheme in ("http", "https") and not os.environ.get("MLFLOW_WORKSPACE")
    return RestRegistry(tracking_uri) if plain else ClientRegistry(tracking_uri)


class RestRegistry:
    """An MLflow server, spoken to in its own REST API."""

    def __init__(self, tracking_uri: str) -> None:
        self._shown = without_credentials(tracking_uri)
        parts = urlsplit(tracking_uri)
        headers = {"Accept": "application/json"}
        user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        if not user and parts.username:
            user, password = unquote(parts.username), unquote(parts.password or "")
        settings = Settings.load()
        account = settings.mlflow_account_at(tracking_uri)
        self._home = settings.home if account is not None else None
        if account is not None:
            # The local server: whatever the person has set is for another one.
            headers |= urllib3.make_headers(basic_auth=":".join(account))
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        elif user:
            headers |= urllib3.make_headers(basic_auth=f"{user}:{password}")
        pool: dict[str, Any] = {}
        if parts.scheme == "https":
            verification = tls_verification()
            if isinstance(verification, bool):
                pool["cert_reqs"] = "CERT_REQUIRED" if verification else "CERT_NONE"
            else:
                pool["ssl_context"] = verification
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        # Whoever asks decides what happens when nobody answers.
        pool |= {"headers": headers, "timeout": timeout, "retries": False}
        proxy = getproxies().get(parts.scheme)
        if proxy and account is None and not proxy_bypass(parts.hostname or ""):
            self._pool: urllib3.PoolManager = urllib3.ProxyManager(proxy, **pool)
        else:
            self._pool = urllib3.PoolManager(**pool)

    def aliases(self, model: str) -> Mapping[str, str]:
        """As `ModelRegistry.aliases`."""
        found = self._ask("GET", "registered-models/get", {"name": model})
        listed = found["registered_model"].get("aliases", []) if found else []
        return {item["alias"]: str(item["version"]) for item in listed}

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """As `ModelRegistry.set_alias`."""
        self._change("POST", "registered-models/alias", {"name": model, "alias": alias, "version": version})

    def versions(self, model: str, release: str) -> list[str]:
        """As `ModelRegistry.versions`."""
        query = {
            "filter": f"name = '{model}' and tags.{TAG_RELEASE} = '{release}'",
            "order_by": "version_number DESC",
            "max_results": "100",
        }
        found = self._ask("GET", "model-versions/search", query)
        return [str(item["version"]) for item in (found or {}).get("model_versions", [])]

    def release(self, model: str, version: str) -> str | None:
        """As `ModelRegistry.release`."""
        found = self._ask("GET", "model-versions/get", {"name": model, "version": version})
        tags = found["model_version"].get("tags", []) if found else []
        return next((str(tag["value"]) for tag in tags if tag["key"] == TAG_RELEASE), None)

    def set_tag(self, model: str, version: str, name: str, value: str) -> None:
        """As `ModelRegistry.set_tag`."""
        self._change("POST", "model-versions/set-tag", {"name": model, "version": version, "key": name, "value": value})

    def delete_version(self, model: str, version: str) -> None:
        """As `ModelRegistry.delete_version`."""
        self._ask("DELETE", "model-versions/delete", {"name": model, "version": version})

    def _change(self, method: str, path: str, values: Mapping[str, str]) -> None:
        if self._ask(method, path, values) is None:
            raise AnsweredError(f"MLflow at {self._shown} has nothing of that name: {path} {dict(values)}")

    def _ask(self, method: str, path: str, values: Mapping[str, str]) -> dict[str, Any] | None:
        """The reply's JSON, or None when MLflow says that there is no such thing."""
        if self._home is not None:
            require_own_server(self._home, self._shown)
        url = f"{self._shown}/api/2.0/mlflow/{path}"
        try:
            asked: dict[str, Any] = {"fields" if method == "GET" else "json": dict(values)}
            reply = self._pool.request(method, url, **asked, preload_content=False)
            body = reply.read(REPLY_BYTES + 1)
            # A connection is used again when all of a reply was read.
            reply.release_conn() if len(body) <= REPLY_BYTES else reply.close()
            if len(body) > REPLY_BYTES:
                raise AnsweredError(
                    f"MLflow at {self._shown} answered {path} with more than {REPLY_BYTES:,} bytes, which are not read"
                )
            said = json.loads(body) if body else {}
        except urllib3.exceptions.HTTPError as error:
            raise ServiceError(f"MLflow at {self._shown} does not answer ({error})") from error
        except ValueError:
            said = {}
        if 200 <= reply.status < 300 and isinstance(said, dict):
            return said
        code = str(said.get("error_code", "")) if isinstance(said, dict) else ""
        if code == MISSING:
            return None
        text = str(said.get("message", "")) if isinstance(said, dict) else ""
        if reply.status in (401, 403):
            raise SettingsError(
                f"MLflow at {self._shown} denied access ({path}: {reply.status} {text}); "
                "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        raise AnsweredError(f"MLflow at {self._shown} answered {path} with {reply.status} {code} {text}".rstrip())


class ClientRegistry:
    """The same through mlflow's own client, whose import costs a second or two."""

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri

    def aliases(self, model: str) -> Mapping[str, str]:
        """As `ModelRegistry.aliases`."""
        with translated(f"reading the aliases of {model}", self._uri), passing_over(MISSING):
            found = connect(self._uri).get_registered_model(model).aliases
            return {name: str(version) for name, version in found.items()}
        return {}

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """As `ModelRegistry.set_alias`."""
        with translated(f"setting alias {alias} of {model} to version {version}", self._uri):
            connect(self._uri).set_registered_model_alias(model, alias, version)

    def versions(self, model: str, release: str) -> list[str]:
        """As `ModelRegistry.versions`."""
        with translated(f"looking for release {release} of {model}", self._uri):
            found = connect(self._uri).search_model_versions(
                f"name = '{model}' and tags.{TAG_RELEASE} = '{release}'", order_by=["version_number DESC"]
            )
            return [str(item.version) for item in found]

    def release(self, model: str, version: str) -> str | None:
        """As `ModelRegistry.release`."""
        with translated(f"reading version {version} of {model}", self._uri), passing_over(MISSING):
            return connect(self._uri).get_model_version(model, version).tags.get(TAG_RELEASE)
        return None

    def set_tag(self, model: str, version: str, name: str, value: str) -> None:
        """As `ModelRegistry.set_tag`."""
        with translated(f"tagging version {version} of {model}", self._uri):
            connect(self._uri).set_model_version_tag(model, version, name, value)

    def delete_version(self, model: str, version: str) -> None:
        """As `ModelRegistry.delete_version`."""
        with translated(f"deleting version {version} of {model}", self._uri), passing_over(MISSING):
            connect(self._uri).delete_model_version(model, version)

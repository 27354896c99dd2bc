"""Work pools that are not the local one: what a deployment may say to them, by the pool's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from prefect.utilities.schema_tools.validation import validate

from train_and_ship.infra.errors import RequestError, ServiceError
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.settings import Settings

IMAGE = "image"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where runs of a deployment are started."""

    name: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the pool's template, by name: what runs of this deployment have otherwise than the pool's others."""
    warnings: Sequence[str] = ()


def parse_variables(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE`, the value in YAML, as of `--set`. Raises RequestError."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        try:
            if not (name.strip() and equals):
                raise ValueError("no name or no =")
            found[name.strip()] = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise RequestError(f"--job-variable: expected NAME=VALUE, got {one!r}: {error}") from None
    return found


def require_pool(settings: Settings, name: str, image: str, given: Sequence[str]) -> Pool:
    """A pool that runs of a deployment can be sent to. Asks Prefect, and writes nothing.

    Args:
        settings: where Prefect is.
        name: of the pool.
        image: of the containers; empty for none.
        given: as of `parse_variables`.

    Raises:
        RequestError: there is no such pool, or its template takes none of that.
        ServiceError: Prefect does not answer.
    """
    variables = {**parse_variables(given), **({IMAGE: image} if image else {})}
    reply = prefect_api(settings, "GET", f"/work_pools/{name}", None)
    if reply.status_code == 404:
        known = prefect_api(settings, "POST", "/work_pools/filter", {})
        names = sorted(pool["name"] for pool in known.json()) if known.is_success else []
        raise RequestError(
            f"--pool: expected a work pool of {settings.prefect_ui_url} ({', '.join(names) or 'it has none'}), got "
            f"{name!r}; `prefect work-pool create {name} --type docker` makes one"
        )
    if not reply.is_success:
        raise ServiceError(f"Prefect: expected the work pool {name}, got {reply.status_code} {reply.text[:200]}")
    pool = reply.json()
    schema = (pool.get("base_job_template") or {}).get("variables") or {}
    properties = schema.get("properties") or {}
    if not properties:
        raise RequestError(
            f"--pool: {name} has no job template yet, so nothing can be held against it; a worker writes it when it "
            f"starts first: prefect worker start --pool {name} --type {pool['type']}"
        )
    if image and IMAGE not in properties:
        raise RequestError(f"--image: the pool {name} is of type {pool['type']}, whose runs have no image")
    if unknown := sorted(variables.keys() - properties.keys()):
        raise RequestError(
            f"--job-variable: expected names of the template of {name} ({', '.join(sorted(properties))}), got "
            f"{', '.join(unknown)}"
        )
    if IMAGE in properties and not (variables.get(IMAGE) or properties[IMAGE].get("default")):
        raise RequestError(
            f"--image: expected the image that runs of {name} begin in, got none: Prefect's own has no train-and-ship; "
            "docs/team.md has the Dockerfile"
        )
    # What a deployment leaves out the pool has.
    for error in validate(dict(variables), schema, ignore_required=True):
        place = error.json_path.removeprefix("$.")
        raise RequestError(f"--job-variable: {place} of the pool {name}: {error.message}")
    return Pool(name=name, variables=variables, warnings=list(_doubts(pool, name, variables.get(IMAGE))))


def _doubts(pool: Mapping[str, Any], name: str, image: Any) -> Sequence[str]:
    found = []
    if pool.get("is_paused"):
        found.append(f"the pool {name} is paused: runs wait until somebody resumes it")
    elif pool.get("status") == "NOT_READY":
        found.append(f"no worker of the pool {name} is there: runs wait until one starts")
    if isinstance(image, str) and "@sha256:" not in image:
        found.append(f"{image} may be another image tomorrow; one by digest (…@sha256:…) may not")
    return found

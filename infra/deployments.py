"""Deploy the flows as prefect.yaml lists them, when it or the code it names has changed.

In a clone it is the file there, which names a job of the clone. Elsewhere it is the installed one, without what only a
clone has.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from torchworker.durable import write_durably
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.settings import clone_folder

TIMEOUT_SECONDS = 180.0
PAGE = 200
"""As many as Prefect's API gives at once."""
BEFORE = "flows."
"""What the names of our flows began with before the packages were called `train_and_ship.…`."""
INSTALLED = Path(__file__).parents[1] / "prefect.yaml"
"""In a wheel beside the packages, in a clone at its top."""
ELSEWHERE = "elsewhere "
"""What the fingerprint of a deployment begins with that no clone has made."""
FLOWS = ("retrain.retrain", "train_and_ship.train_and_ship", "rollback.rollback", "promote.promote")
Api = Callable[[str, str, Mapping[str, Any]], httpx.Response]


def deploy(
    *,
    api: Api,
    command: Sequence[str],
    environment: Mapping[str, str],
    state: Path,
    report: Callable[[str], None],
) -> None:
    """Run a command in the folder of prefect.yaml, unless that would change nothing.

    Outside of a clone the flows that a clone has deployed stay as they are. What `ship deploy` stored with an earlier
    version gets the name of its flow of today.

    Args:
        api: asks Prefect: method, path and body to its reply.
        command: `prefect deploy --all`.
        environment: the command's variables.
        state: the file that remembers what was deployed last.
        report: called with each line for the person.

    Raises:
        SettingsError: prefect.yaml cannot be read, or the command failed; with its last lines.
    """
    began = time.monotonic()
    clone = clone_folder()
    folder = clone or _without_clone(state.parent)
    file = folder / "prefect.yaml"
    names = _names(file)
    fingerprint = _fingerprint(clone or INSTALLED.parent, file)
    found = _deployed(api)
    _rename_flows(api, found)
    there = names <= {item["name"] for item in found}
    before = state.read_text() if state.exists() else ""
    if there and (before == fingerprint or (clone is None and before and not before.startswith(ELSEWHERE))):
        report(f"deployments: {', '.join(sorted(names))} (unchanged)")
        return
    output, failed = run_to_its_end(command, environment, TIMEOUT_SECONDS, folder)
    # One invalid entry makes the command skip the others, so its word is not enough.
    missing = names - {item["name"] for item in _deployed(api)}
    if failed or missing:
        last = "\n".join(output.splitlines()[-20:])
        raise SettingsError(
            f"{file} could not be deployed"
            + (f" (missing: {', '.join(sorted(missing))})" if missing else "")
            + f". The end of `prefect deploy --all`:\n{last}"
        )
    state.write_text(fingerprint)
    report(f"deployments: {', '.join(sorted(names))} ({time.monotonic() - began:.1f} s)")


def _without_clone(folder: Path) -> Path:
    """A folder with the installed prefect.yaml, without jobs that only a clone has; their schedules are switched off.

    folder: of this stack, where it is made.
    """
    content = yaml.safe_load(INSTALLED.read_text())
    for deployment in content["deployments"]:
        if deployment.get("parameters", {}).pop("job", None) is not None:
            for schedule in deployment.get("schedules", []):
                schedule["active"] = False
    made = make_folder(folder / "installed")
    write_durably(made / "prefect.yaml", yaml.safe_dump(content, sort_keys=False).encode())
    return made


def run_to_its_end(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, folder: Path | None = None
) -> tuple[str, bool]:
    """Run a command that asks nothing.

    Args:
        command: argument list.
        environment: its variables.
        seconds: how long it may take.
        folder: where it runs; the current one when None.

    Returns:
        What it printed, and whether it failed or took longer than it may.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s", True
    return done.stdout, done.returncode != 0


def _names(file: Path) -> set[str]:
    """Names of the deployments in a prefect.yaml. Raises SettingsError when it is not YAML with named deployments."""
    try:
        content = yaml.safe_load(file.read_text()) or {}
        return {str(deployment["name"]) for deployment in content.get("deployments") or []}
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise SettingsError(f"{file}: expected a mapping with a list of named deployments, got {error}") from None


def _deployed(api: Api) -> list[Mapping[str, Any]]:
    """Every deployment that the server has; none when it does not say."""
    found: list[Mapping[str, Any]] = []
    while True:
        reply = api("POST", "/deployments/filter", {"limit": PAGE, "offset": len(found), "sort": "NAME_ASC"})
        page = reply.json() if reply.is_success else []
        found += page
        if len(page) < PAGE:
            return found


def _rename_flows(api: Api, deployments: Sequence[Mapping[str, Any]]) -> None:
    """Give deployments that name our flows as they were called before the names of today."""
    old = {BEFORE + flow: f"train_and_ship.{BEFORE}{flow}" for flow in FLOWS}
    for deployment in deployments:
        if (entrypoint := old.get(deployment["entrypoint"])) is not None:
            api("PATCH", f"/deployments/{deployment['id']}", {"entrypoint": entrypoint})


def _fingerprint(packages: Path, file: Path) -> str:
    """Changes with prefect.yaml and our packages: a deployment holds its flow's parameter schema.

    Args:
        packages: the folder whose subfolders they are.
        file: that is deployed.
    """
    digest = hashlib.sha256(file.read_bytes())
    digest.update(str(file.parent).encode())
    for source in sorted(packages.glob("*/*.py")):
        if (source.parent / "__init__.py").exists():
            stat = source.stat()
            digest.update(f"{source.relative_to(packages)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return (ELSEWHERE if file.parent != packages else "") + digest.hexdigest()

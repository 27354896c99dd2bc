"""The texts that `ship init` writes: job file, its schema, and a workflow of GitHub that checks it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from train_and_ship.registry.job.load import job_schema

IGNORED = ".ship/"
"""The folder of local state."""
_ABOVE = {
    "name": "Of the model, wherever it is listed.",
    "project": "The folder that the code is imported from.",
    "model": "Called in every process; returns the torch.nn.Module.",
    "data": 'Called with split="train" and with split="validation"; returns a dataset of (inputs, target).',
    "train": "Loss, optimizer, metrics and schedule are names, or functions of yours.",
    "gates": "What has to hold before anything goes live; `min` is a limit, `vs_live` is against what it replaces.",
    "retrain": "Asked then whether anything has changed: code, data, job or packages.",
}


def training(loss: str | None) -> dict[str, Any]:
    """How it is trained, gated and trained again. loss: of torch; None when the sources name no single one."""
    named = loss or "cross_entropy"
    train = {"epochs": 10, "batch_size": 64, "learning_rate": 0.001, "loss": named}
    # Of errors the unit is not known.
    gates = {"gates": {"accuracy": {"vs_live": -0.01}}} if "cross_entropy" in named else {}
    return {"train": train, **gates, "retrain": {"cron": "0 2 * * *", "timezone": "UTC"}}


def schema_line(schema: str) -> str:
    """What editors with a YAML language server read. schema: path from the job file."""
    return f"# yaml-language-server: $schema={schema}"


def job_text(document: Mapping[str, Any], schema: str) -> str:
    """The job file: each part of the document below a comment, in its order. schema: path from the job file."""
    parts = []
    for key, value in document.items():
        comment = f"# {_ABOVE[key]}\n" if key in _ABOVE else ""
        parts.append(comment + yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True))
    return f"{schema_line(schema)}\n" + "\n".join(parts)


def schema_text() -> str:
    """What `ship schema` prints."""
    return json.dumps(job_schema(), indent=2) + "\n"


def workflow_text(folder: Path, repository: Path) -> str:
    """A workflow of GitHub Actions that runs `ship check`. Both absolute; the folder has the job file."""
    below = folder.relative_to(repository.resolve()).as_posix()
    installs = _installs(folder)
    where = f"    defaults: {{run: {{working-directory: {json.dumps(below)}}}}}\n" if below != "." else ""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"""\
# Makes what the job names, tries it once and exports it untrained, for every change.
name: check
on: [push, pull_request]
permissions: {{contents: read}}
jobs:
  check:
    runs-on: ubuntu-latest
    timeout-minutes: 30
{where}    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with: {{python-version: "{python}"}}
      # A variable of the repository (settings, actions, variables): address or path of the wheel that has `ship`.
      - run: python -m pip install "${{SHIP_WHEEL:?set the variable SHIP_WHEEL of the repository}}"
        env: {{SHIP_WHEEL: "${{{{ vars.SHIP_WHEEL }}}}"}}
{installs}      - run: ship check job.yaml
"""


def _installs(folder: Path) -> str:
    """The step that installs what the project itself needs; empty when nothing says what that is."""
    if (folder / "requirements.txt").is_file():
        return "      - run: python -m pip install -r requirements.txt\n"
    if (folder / "pyproject.toml").is_file() and "[project]" in (folder / "pyproject.toml").read_text(errors="replace"):
        return "      - run: python -m pip install .\n"
    return ""

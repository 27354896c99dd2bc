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
    "python": "The environment that the code runs in; it has torch and torchworker.",
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


def workflow_text(folder: Path, repository: Path, interpreter: str | None) -> str:
    """A workflow of GitHub Actions that runs `ship check`, with the project in an environment of its own.

    Args:
        folder: of the job file, absolute.
        repository: its root, absolute.
        interpreter: that the job names; None where it names none.
    """
    below = folder.relative_to(repository.resolve()).as_posix()
    installs = _installs(folder)
    # Of another machine's environment.
    other = " --set python=.venv/bin/python" if installs and interpreter not in (None, ".venv/bin/python") else ""
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
      # A variable of the repository (settings, actions, variables): addresses or paths of the three wheels with `ship`,
      # in one line, so that no package index is asked for one of their names.
      - run: python -m pip install ${{SHIP_WHEELS:?set the variable SHIP_WHEELS of the repository}}
        env: {{SHIP_WHEELS: "${{{{ vars.SHIP_WHEELS }}}}"}}
{installs}      - run: ship check job.yaml{other}
"""


def _installs(folder: Path) -> str:
    """The step that makes the project's environment; empty when nothing says what it needs."""
    project = folder / "pyproject.toml"
    if (folder / "requirements.txt").is_file():
        needs = "-r requirements.txt"
    elif project.is_file() and "[project]" in project.read_text(errors="replace"):
        needs = "."
    else:
        return ""
    steps = ("python -m venv .venv", f".venv/bin/python -m pip install {needs}", "ship worker install")
    return "".join(["      - run: |\n", *(f"          {step}\n" for step in steps)])

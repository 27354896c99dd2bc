"""Databases of Prefect and MLflow without a row: their migrations cost more CPU time than starting a whole stack."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.made_once import made_once

FILES = {"prefect": "prefect.db", "mlflow": "mlflow.db"}
"""By the folder of a stack's home that each lies in."""


def put_databases(home: Path, *components: str) -> None:
    """Put them where a stack that lives in `home` looks for them, before it is started for the first time."""
    versions = tuple(importlib.metadata.version(name) for name in ("prefect", "mlflow", "sqlalchemy", "alembic"))
    made = made_once("databases", versions, _make)
    for component in components or FILES:
        target = home / component / FILES[component]
        target.parent.mkdir(parents=True, exist_ok=True)
        assert not target.exists(), f"{target} holds somebody's state"
        shutil.copyfile(made / target.name, target)


def _make(folder: Path) -> None:
    """By the commands that their manuals name for it."""
    home = folder / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    for words in (
        ("prefect", "server", "database", "upgrade", "-y"),
        ("mlflow", "db", "upgrade", f"sqlite:///{folder / FILES['mlflow']}"),
    ):
        command = [Path(sys.executable).with_name(words[0]), *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (home / FILES["prefect"]).rename(folder / FILES["prefect"])
    shutil.rmtree(home)

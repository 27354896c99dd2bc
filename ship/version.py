"""`ship --version`: of this, and of what it uses."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

USED = ("torch", "prefect", "mlflow", "onnxruntime", "boto3")


def versions() -> str:
    """`train-and-ship 0.1.0 (Python 3.11.7, torch 2.13.0, …)`, without importing any."""
    used = []
    for name in USED:
        try:
            used.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            used.append(f"no {name}")
    return f"train-and-ship {version('train-and-ship')} (Python {platform.python_version()}, {', '.join(used)})"

"""The environment of a local stack that has a folder and ports of its own, and nothing of the developer's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.support.passwords import VARIABLES, put_password
from tests.support.ports import free_ports
from train_and_ship.infra.settings import LOOPBACK

FOREIGN = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "SHIP_BUCKET", "PREFECT_PROFILE")
"""Addresses and accounts of the developer's own services, which must never be used, nor written to, by a test."""
HOME = pytest.StashKey[Path]()
"""The home of the testing process's stack: tests may take SHIP_HOME out of the environment."""


def stack_environment(home: Path) -> dict[str, str]:
    """The variables that put a stack in `home`, on free ports."""
    prefect, mlflow, s3 = free_ports(3)
    return {
        "SHIP_HOME": str(home),
        "SHIP_PREFECT_PORT": str(prefect),
        "SHIP_MLFLOW_PORT": str(mlflow),
        "SHIP_S3_PORT": str(s3),
        "PREFECT_API_URL": f"http://{LOOPBACK}:{prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{mlflow}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Workers run jobs that tests write.
        "SHIP_JOB_FOLDERS": tempfile.gettempdir(),
        # Inductor would compile and load a program for each kind of vector unit, to see whether the compiler can.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }


def enter_local_stack(home: Path) -> None:
    """From now on this process and what it starts mean that stack. Nothing is started."""
    for variable in FOREIGN:
        os.environ.pop(variable, None)
    put_password(home)
    os.environ.update({**stack_environment(home), **VARIABLES})

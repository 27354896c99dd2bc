"""The password of every stack and server that tests start: one, so that whoever asks need not know which it is."""

from __future__ import annotations

import os
from pathlib import Path

from train_and_ship.infra.password import FILE, USER
from train_and_ship.infra.settings import MLFLOW_ACCOUNT, PREFECT_ACCOUNT

PASSWORD = "7e57" * 12
"""As long as a real one, and easy to find where none should be."""
VARIABLES = {PREFECT_ACCOUNT: f"{USER}:{PASSWORD}", **dict(zip(MLFLOW_ACCOUNT, (USER, PASSWORD), strict=True))}
"""By which clients that are not ours get in."""


def put_password(home: Path) -> None:
    """Put it where the servers of a home look for it, before `ship up` makes a random one."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(home / FILE, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(PASSWORD + "\n")

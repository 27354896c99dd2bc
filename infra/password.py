"""The password of the local stack: a random one for each home, made by `ship up`, in a file for its owner alone."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.home import make_folder

USER = "ship"
"""Who asks Prefect and MLflow, and the access key of the S3 server; the password is its secret."""
FILE = "password"
"""In the home."""
BYTES = 24


def read_password(home: Path) -> str | None:
    """The password of this home; None before `ship up` made it, or where a power cut left nothing of it.

    Raises SettingsError where this user may not read it.
    """
    path = home / FILE
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SettingsError(
            f"{path}: expected the password of the local stack, which its owner may read, got {error}"
        ) from None


def make_password(home: Path) -> str:
    """The password of this home, made when there is none: written whole, with mode 600. Raises OSError."""
    if (known := read_password(home)) is not None:
        return known
    made = secrets.token_hex(BYTES)
    part = make_folder(home) / f".{FILE}.part"
    part.unlink(missing_ok=True)
    # The mode goes with the call, and nobody else's file is written into.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(home / FILE)
    folder = os.open(home, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return made


def password_is_open(home: Path) -> str:
    """Why the password is none, and what to do; empty while nobody else may read it, or there is none."""
    path = home / FILE
    if not path.exists() or not path.stat().st_mode & 0o077:
        return ""
    return f"{path} can be read by others: `chmod 600 {path}`; for a new password delete it, `ship down` and `ship up`"

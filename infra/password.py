"""The password of the local stack: a random one for each home, made by `ship up`, in a file for its owner alone."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.home import make_folder

USER = "ship"
"""Who asks Prefect and MLflow, and the access key of the S3 server; the password is its secret."""
FILE = "password"
"""In the home."""
BYTES = 24
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
SURE_SECONDS = 60.0
_sure: dict[tuple[Path, int | None], float] = {}
"""Home and port to when the table is read again."""


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


def require_own_server(home: Path, address: str) -> None:
    """Before a server of this machine is sent the password: it runs under the user whose password it is.

    While the stack is down anybody may listen at its ports. The kernel's table of sockets says who does; it may be
    long, and what it said is believed for a while.

    Args:
        home: of the password.
        address: of the server, with its port.

    Raises:
        SettingsError: somebody else's program listens there.
    """
    port, now = urlsplit(address).port, time.monotonic()
    if now < _sure.get((home, port), now):
        return
    try:
        owner = (home / FILE).stat().st_uid
        tables = [path.read_text() for path in TABLES if path.exists()]
    except OSError:
        return
    if port is None:
        return
    found = {user for table in tables for user in _listeners(table, port)}
    if others := found - {owner}:
        raise SettingsError(
            f"a program of another user (uid {', '.join(map(str, sorted(others)))}) listens at {address}, and is not "
            "sent the password of your stack; use other ports (SHIP_PREFECT_PORT, SHIP_MLFLOW_PORT, SHIP_S3_PORT)"
        )
    if found:
        _sure[home, port] = now + SURE_SECONDS


def _listeners(table: str, port: int) -> set[int]:
    """Users whose sockets listen at a port. table: as /proc/net/tcp has it, which may be long."""
    # Local address, state (0A: it listens) and, three fields later, the user.
    row = rf"^ *\d+: [0-9A-F]+:{port:04X} [0-9A-F:]+ 0A(?: +\S+){{3}} +(\d+) "
    return {int(user) for user in re.findall(row, table, re.MULTILINE)}

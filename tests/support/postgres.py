"""A PostgreSQL server on loopback, from Debian's package: what stands behind a team's Prefect and MLflow."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import PATIENCE
from train_and_ship.infra.settings import LOOPBACK

USER, PASSWORD = "ship", "open-sesame"


def binaries() -> Path | None:
    """The folder of the newest server's programs, installed with apt-get when this is root; None when there is none."""
    if not (found := _installed()) and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "postgresql"]
        subprocess.run(
            install, check=False, capture_output=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
        found = _installed()
    return found


def _installed() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """A running server."""

    programs: Path
    port: int

    def run(self, program: str, *arguments: str, **options: object) -> bytes:
        """One of PostgreSQL's client programs against this server; its output."""
        where = ("--host", LOOPBACK, "--port", str(self.port), "--username", USER)
        done = subprocess.run(
            [self.programs / program, *where, *arguments],
            check=True,
            env={**os.environ, "PGPASSWORD": PASSWORD},
            stdout=subprocess.PIPE,
            **options,  # type: ignore[call-overload]
        )
        return bytes(done.stdout)

    def url(self, driver: str, database: str) -> str:
        return f"{driver}://{USER}:{PASSWORD}@{LOOPBACK}:{self.port}/{database}"


@contextmanager
def postgres(programs: Path, port: int) -> Iterator[Postgres]:
    """A server with an empty folder of its own; it refuses to run as root and then runs as its package's user."""
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    # Not below pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="ship-postgres-"))
    (folder / "password").write_text(PASSWORD)
    for path in (folder, folder / "password"):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    becoming = {"user": owner.pw_uid, "group": owner.pw_gid} if os.geteuid() == 0 else {}
    data = folder / "data"
    try:
        subprocess.run(
            [programs / "initdb", "--pgdata", data, "--username", USER, "--pwfile", folder / "password",
             "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"],
            check=True, capture_output=True, cwd=folder, **becoming,  # type: ignore[call-overload]
        )  # fmt: skip
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-h", LOOPBACK, "-p", str(port), "-k", folder,
             "-c", "fsync=off", "-c", "max_connections=200"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **becoming,  # type: ignore[call-overload]
        )  # fmt: skip
        try:
            _wait(port, server)
            yield Postgres(programs=programs, port=port)
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert server.poll() is None and time.monotonic() < deadline, "PostgreSQL did not start"
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)

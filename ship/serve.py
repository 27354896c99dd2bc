"""`ship serve`: a REST endpoint of what is live on a channel, by MLServer, following the channel.

The reader pulls and verifies; MLServer loads what it is pointed to, the new release before it lets go of the old one. A
release that MLServer cannot load does not become current.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import typer

from shipreader.errors import ReaderError
from shipreader.mlserver import BATCH_SECONDS, BATCH_SIZE, write_model
from shipreader.records import Release
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.processes import last_lines, port_holder, port_is_free
from train_and_ship.infra.settings import LOOPBACK, Settings
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.pull import current, folder_for, make_reader, reader_errors, wait_for_signal

BELOW_PYTHON = (3, 13)
"""mlserver 1.7.1 says `Requires-Python: <3.13,>=3.9`."""
START_SECONDS = 120
LOAD_SECONDS = 300
STOP_SECONDS = 20

# Ends with us, also when we are killed: SIGTERM lets it answer what it has.
_START = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "from mlserver.cli import main; sys.argv = ['mlserver', 'start', sys.argv[1]]; main()"
)


def require_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Raises SettingsError on a Python that the newest MLServer does not install on."""
    if version >= BELOW_PYTHON:
        mine, below = (".".join(map(str, numbers)) for numbers in (version, BELOW_PYTHON))
        raise SettingsError(
            f"ship serve: expected Python below {below}, which MLServer 1.7.1 needs, and this is {mine}; serve from an "
            "environment of Python 3.12 (train, promote and pull with any), or by another server: `ship view triton`, "
            "`ship view kserve`, shipreader"
        )


def requirements() -> list[str]:
    """What the serving environment holds, each with its version."""
    lines = Path(__file__).with_name("mlserver-requirements.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def serve(model: str, channel: str, to: Path | None, port: int, interval: float, batch_size: int) -> None:
    """Serve until interrupted.

    Raises SettingsError for a Python that MLServer does not run on or a taken port, ServiceError when the server does
    not start.
    """
    require_python()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    settings = Settings.load()
    folder = folder_for(settings, model, channel, to)
    server = Server(folder=folder / "mlserver", model=model, port=port, batch_size=batch_size)
    server.require_ports()
    with reader_errors(settings, model):
        reader = make_reader(settings, model, channel, folder, accept=server.load, interval=interval)
        release = reader.start()
        # Also when nothing moved since the last time.
        server.load(release)
        with server.running(), closing(reader):
            typer.echo(
                f"{current(release)}\n"
                f"  infer    {server.url}/v2/models/{model}/infer\n"
                f"  docs     {server.url}/v2/docs\n"
                f"  log      {server.log}"
            )
            wait_for_signal(server.require_alive)


@dataclass(kw_only=True)
class Server:
    """One MLServer on loopback."""

    folder: Path
    """Its settings, model repository and log."""
    model: str
    port: int
    """HTTP; the next two are gRPC and metrics."""
    batch_size: int = BATCH_SIZE
    batch_seconds: float = BATCH_SECONDS
    _process: subprocess.Popen[bytes] | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "mlserver.log"

    def require_ports(self) -> None:
        """Raises SettingsError when one of its ports is taken."""
        for port in range(self.port, self.port + 3):
            if not port_is_free(port):
                raise SettingsError(
                    f"--port {self.port}: HTTP, gRPC and metrics need the ports {self.port} to {self.port + 2}, and "
                    f"{port} is taken by {port_holder(port)}; name another"
                )

    def load(self, release: Release) -> None:
        """Make a release the one that is served, or the one to start with. Raises ReaderError; the old one stays."""
        path = self.folder / "models" / self.model / "model-settings.json"
        with self._loading:
            before = path.read_bytes() if path.exists() else None
            write_model(self.folder / "models", release, batch_size=self.batch_size, batch_seconds=self.batch_seconds)
            if self._process is None:
                return
            try:
                answer = httpx.post(
                    f"{self.url}/v2/repository/models/{self.model}/load", timeout=LOAD_SECONDS, trust_env=False
                )
                if answer.is_success:
                    return
                problem = f"{answer.status_code}: {answer.text[:500]}"
            except httpx.HTTPError as error:
                problem = f"no answer: {error}"
            if before is not None:
                path.write_bytes(before)
            raise ReaderError(f"MLServer did not load it ({problem}); its log is {self.log}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start it, wait until it serves, and stop it at the end. Raises ServiceError."""
        python = environment("mlserver", requirements(), typer.echo)
        self._write_settings()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-P", "-c", _START, str(self.folder)],
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if not name.startswith(("MLSERVER_", "PYTHON"))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
            yield
        finally:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def require_alive(self) -> None:
        """Raises ServiceError when it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise ServiceError(f"MLServer ended; the last lines of {self.log}:\n{last_lines(self.log)}")

    def _write_settings(self) -> None:
        document = {
            "host": LOOPBACK,
            "http_port": self.port,
            "grpc_port": self.port + 1,
            "metrics_port": self.port + 2,
            "metrics_dir": str(self.folder / "metrics"),
            "environments_dir": str(self.folder / "environments"),
            "model_repository_root": str(self.folder / "models"),
            # In the server's own process: the runtime lets go of the interpreter while it computes.
            "parallel_workers": 0,
            "debug": False,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(document, indent=1))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.require_alive()
            try:
                if httpx.get(f"{self.url}/v2/models/{self.model}/ready", timeout=5, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise ServiceError(f"MLServer: no answer within {START_SECONDS} s; last lines:\n{last_lines(self.log)}")

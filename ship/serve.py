"""`ship serve`: REST and gRPC for what is live on a channel, following the channel.

The reader pulls and verifies; a server in a process and an environment of its own (shipreader/inference_server.py)
loads what it is told to, the new release before it lets go of the old one. A release that it cannot load does not
become current.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import typer

import shipreader
from shipreader.errors import ReaderError, RefusedError
from shipreader.mlserver import BATCH_SIZE, require_datatypes, rows_together, served
from shipreader.records import Release
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.processes import last_lines, port_holder, port_is_free
from train_and_ship.infra.settings import LOOPBACK, Settings
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.pull import current, folder_for, make_reader, reader_errors, wait_for_signal

LOAD_SECONDS = 300
STOP_SECONDS = 20

# The package by its folder: beside it lie packages that the server's environment has in other versions.
_START = """
import importlib.util, sys
folder, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "shipreader", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["shipreader"] = importlib.util.module_from_spec(spec)
sys.argv = ["inference_server", *arguments]
from shipreader.inference_server import main
main()
"""


def requirements() -> list[str]:
    """What the serving environment holds, each with its version."""
    lines = Path(__file__).with_name("serving-requirements.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def serve(model: str, channel: str, to: Path | None, port: int, interval: float, batch_size: int) -> None:
    """Serve until interrupted.

    Raises SettingsError for a taken port, ServiceError when the server does not start.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    settings = Settings.load()
    folder = folder_for(settings, model, channel, to)
    server = Server(folder=folder / "server", model=model, port=port, batch_size=batch_size)
    server.require_ports()
    with contextlib.closing(server), reader_errors(settings, model):
        # Also when it has become current: nobody here accepted what another process brought, or what lay there before.
        reader = make_reader(
            settings, model, channel, folder, accept=server.load, on_change=server.load, interval=interval
        )
        with contextlib.closing(reader):
            try:
                release = reader.start()
            except ReaderError:
                # Not the release's fault.
                server.require_alive()
                raise
            typer.echo(
                f"{current(release)}\n"
                f"  infer    {server.url}/v2/models/{model}/infer\n"
                f"  gRPC     {LOOPBACK}:{port + 1}, metrics at http://{LOOPBACK}:{port + 2}/metrics\n"
                f"  log      {server.log}\n"
                f"  compute  {server.threads}"
            )
            wait_for_signal(server.require_alive)


@dataclass(kw_only=True)
class Server:
    """One server on loopback; started by the first release that it is to load."""

    folder: Path
    """Its log."""
    model: str
    port: int
    """HTTP; the next two are gRPC and metrics."""
    batch_size: int = BATCH_SIZE
    threads: str = ""
    """What it found about its threads."""
    _process: subprocess.Popen[bytes] | None = None
    _failure: ServiceError | None = None
    _served: tuple[str, int] | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Of HTTP."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        """What it says of itself."""
        return self.folder / "server.log"

    def require_ports(self) -> None:
        """Raises SettingsError when one of its ports is taken."""
        for port in range(self.port, self.port + 3):
            if not port_is_free(port):
                raise SettingsError(
                    f"--port {self.port}: HTTP, gRPC and metrics need the ports {self.port} to {self.port + 2}, and "
                    f"{port} is taken by {port_holder(port)}; name another"
                )

    def require_alive(self) -> None:
        """Raises ServiceError when it could not be started, or has ended."""
        if self._failure is not None:
            raise self._failure
        if self._process is not None and self._process.poll() is not None:
            raise self._fault(f"it ended with {self._process.returncode}")

    def load(self, release: Release) -> None:
        """Make a release the one that is served.

        Raises ReaderError, and the old one stays; ServiceError when the server does not start or has ended.
        """
        if self._served == (release.id, release.generation):
            return
        signature = release.manifest.signature
        require_datatypes(signature)
        document = {
            "model": release.model,
            "generation": release.generation,
            "artifact": str(release.artifact(served(release))),
            "signature": dict(signature),
            "batch_size": rows_together(signature, self.batch_size),
        }
        with self._loading:
            if self._process is None:
                self._start()
            reply = self._ask(document)
            if "error" in reply:
                raise RefusedError(f"the server did not load it ({reply['error']}); its log is {self.log}")
            self._served, self.threads = (release.id, release.generation), reply["threads"]

    def _start(self) -> None:
        try:
            python = environment("serving", requirements(), typer.echo)
        except ServiceError as error:
            self._failure = error
            raise
        self.folder.mkdir(parents=True, exist_ok=True)
        (package,) = shipreader.__path__
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-P", "-c", _START, package, self.model, str(self.port)],
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._failure = None

    def _fault(self, what: str) -> ServiceError:
        self._failure = ServiceError(f"the server: {what}; last lines of {self.log}:\n{last_lines(self.log)}")
        return self._failure

    def _ask(self, document: dict[str, object]) -> dict[str, str]:
        """One line there, one line back."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
            self._process.stdin.flush()
            poll = select.poll()
            poll.register(self._process.stdout, select.POLLIN)
            if not poll.poll(1000 * LOAD_SECONDS):
                fault = self._fault(f"generation {document['generation']} was not loaded within {LOAD_SECONDS} s")
                # Its answer, when it came, would be taken for that to the next question.
                self._process.kill()
                raise fault
            line = self._process.stdout.readline()
        if not line:
            raise self._fault(f"it ended with {self._process.wait(STOP_SECONDS)}")
        reply: dict[str, str] = json.loads(line)
        return reply

    def close(self) -> None:
        """Let it answer what it has, and end it."""
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

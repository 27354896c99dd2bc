"""`ship serve`: REST and gRPC for what is live on a channel, following the channel.

The reader pulls and verifies; a server in a process and an environment of its own (shipreader/inference_server.py)
loads what it is told to, the new release before it lets go of the old one. A release that it cannot load does not
become current. A server that ended or hangs is started again with what it served, and the command ends when that is
in vain.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

import shipreader
from shipreader.errors import ReaderError, RefusedError
from shipreader.inference_limits import LOOPBACK, Limits
from shipreader.mlserver import BATCH_SIZE, require_datatypes, rows_together, served
from shipreader.records import Release
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.job_environment import inherited
from train_and_ship.infra.processes import last_lines, port_holder, port_is_free
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.pull import current, folder_for, make_reader, reader_errors, wait_for_signal

LOAD_SECONDS = 300
STOP_SECONDS = 20
END_SECONDS = 5
"""Between the end of what a process writes and its own."""
LOOK_SECONDS, HEALTH_SECONDS, ANSWER_SECONDS = 0.5, 5.0, 30.0
"""Between two looks at the process; between two questions to it; for its answer."""
MOST_STARTS, FIRST_PAUSE_SECONDS = 5, 1.0
"""In a row to bring it back, with a pause after the first that doubles."""
MOST_DEATHS = 2
"""With one release that it is to load: then that release is not tried again."""
MOST_LOSSES, CALM_SECONDS = 5, 600.0
"""So often it may be gone within so long; then something is wrong that a start does not mend."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*", re.ASCII)

_log = logging.getLogger(__name__)

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
    """What the serving environment holds, each with its version and the hashes of all its wheels."""
    text = Path(__file__).with_name("serving-requirements.txt").read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if not line.lstrip().startswith("#") and line.strip()]


def serve(
    model: str,
    channel: str,
    to: Path | None,
    port: int,
    interval: float,
    batch_size: int,
    max_stale: float | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve until interrupted.

    Raises SettingsError for a taken port and for what is no name of a host, ServiceError when the server does not
    start, or is gone and cannot be brought back.
    """
    for name in limits.hosts if limits is not None else ():
        if not _HOST_NAME.fullmatch(name):
            raise SettingsError(
                "--allow-host: expected the name of a host without port or path, such as models.example.com, "
                f"got {name!r}"
            )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    settings = Settings.load()
    folder = folder_for(settings, model, channel, to)
    server = Server(folder=folder / "server", model=model, port=port, batch_size=batch_size, limits=limits or Limits())
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
            server.keep(reader.note_fault, lambda: reader.status().ready(max_stale))
            wait_for_signal(server.require_alive)


class GoneError(Exception):
    """The server's process ended, or hangs; the message says which."""


@dataclass(kw_only=True)
class Server:
    """One server on loopback; started by the first release that it is to load, and again when it is gone."""

    folder: Path
    """Its log."""
    model: str
    port: int
    """HTTP; the next two are gRPC and metrics."""
    batch_size: int = BATCH_SIZE
    limits: Limits = field(default_factory=Limits)
    threads: str = ""
    """What it found about its threads."""
    _process: subprocess.Popen[bytes] | None = None
    _replies: bytes = b""
    _release: Release | None = None
    """What it served last."""
    _loaded: bool = False
    """Whether the process that runs serves that."""
    _deadly: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How often it ended when it was to load a release."""
    _failure: ServiceError | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock)
    """One question to the process at a time, or one start of it."""
    _closing: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Of HTTP."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        """What it says of itself; with `.1` behind it, what the process before said."""
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
        """Raises ServiceError when it could not be started, or could not be brought back."""
        if self._failure is not None:
            raise self._failure

    # ---- what it serves

    def load(self, release: Release) -> None:
        """Make a release the one that is served.

        Raises ReaderError, and the old one stays, or is brought back by `keep`; ServiceError when the server does not
        start.
        """
        with self._loading:
            if self._closing.is_set():
                raise self._failure or ServiceError("the server is being ended")
            key = release.id, release.generation
            if self._loaded and self._release is not None and key == (self._release.id, self._release.generation):
                return
            if self._deadly[key] >= MOST_DEATHS:
                raise RefusedError(
                    f"the server ended when it was to load it, and is not asked again; its log was {self.log}. Move "
                    "the channel, or start ship serve anew"
                )
            document = self._document(release)
            if self._process is not None and self._process.poll() is not None:
                # By itself: not this release's fault.
                self._gone("")
            try:
                if self._process is None:
                    self._start()
                reply = self._ask(document, LOAD_SECONDS)
            except GoneError as error:
                if self._release is None:
                    self._failure = ServiceError(
                        f"the server: {error}; last lines of {self.log}:\n{last_lines(self.log)}"
                    )
                    raise self._failure from error
                self._deadly[key] += 1
                raise RefusedError(f"the server did not load it ({error}); its log is {self.log}") from error
            except ServiceError as error:
                if self._release is None:
                    self._failure = error
                raise
            self._take(release, reply)
            self._failure = None

    def _document(self, release: Release) -> dict[str, object]:
        signature = release.manifest.signature
        require_datatypes(signature)
        return {
            "model": release.model,
            "generation": release.generation,
            "artifact": str(release.artifact(served(release))),
            "signature": dict(signature),
            "batch_size": rows_together(signature, self.batch_size),
        }

    def _take(self, release: Release, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise RefusedError(f"the server did not load it ({reply['error']}); its log is {self.log}")
        self._release, self._loaded, self.threads = release, True, reply["threads"]

    # ---- whether it does

    def keep(self, note: Callable[[str], None], fresh: Callable[[], bool]) -> None:
        """Watch the process in a thread from now on, and start it again when it ended or hangs.

        Args:
            note: told what is wrong, and an empty text when it serves again.
            fresh: whether what is served is known to be live; the process is told, and is ready only then.
        """
        self._keeper = threading.Thread(target=self._keep, args=(note, fresh), name="ship-serve-keeper", daemon=True)
        self._keeper.start()

    def _keep(self, note: Callable[[str], None], fresh: Callable[[], bool]) -> None:
        try:
            self._watch(note, fresh)
        except Exception as error:
            # Whatever it is, a thread that ended would leave the server unwatched without a word.
            self._give_up(f"it cannot be watched: {error!r}")

    def _watch(self, note: Callable[[str], None], fresh: Callable[[], bool]) -> None:
        lost: list[float] = []
        asked = 0.0
        while not self._closing.wait(LOOK_SECONDS):
            with self._loading:
                due = time.monotonic() > asked + HEALTH_SECONDS
                if due:
                    asked = time.monotonic()
                try:
                    self._require_health(fresh if due else None)
                    continue
                except GoneError as error:
                    why = str(error)
            if self._closing.is_set():
                return
            note(f"the server is gone ({why}) and is started again")
            _log.error("%s: the server is gone (%s); starting it again", self.model, why)
            lost = [when for when in lost if when > time.monotonic() - CALM_SECONDS] + [time.monotonic()]
            if len(lost) > MOST_LOSSES:
                self._give_up(f"it was gone {len(lost)} times within {CALM_SECONDS / 60:g} minutes, now because {why}")
                return
            try:
                if not self._brought_back():
                    return
            except (GoneError, ReaderError, ServiceError, OSError) as error:
                self._give_up(f"{why}, and could not be started again in {MOST_STARTS} tries: {error}")
                return
            note("")
            _log.warning("%s: serving again", self.model)

    def _give_up(self, why: str) -> None:
        self._failure = ServiceError(f"the server: {' '.join(why.split())}; its log is {self.log}")
        self._closing.set()

    def _require_health(self, fresh: Callable[[], bool] | None) -> None:
        """Raises GoneError unless it runs; with `fresh`, also unless it answers and what it computes ends some day."""
        if self._process is None:
            raise GoneError("it was ended")
        if self._process.poll() is not None:
            raise self._gone(_ending(self._process.returncode))
        if fresh is None:
            return
        computing = self._ask({"fresh": fresh()}, ANSWER_SECONDS)["computing"]
        if computing > self.limits.compute_seconds:
            raise self._gone(f"it computes one batch for {computing:.0f} s already")

    def _brought_back(self) -> bool:
        """Start it with what it served; False when that was not needed any more. Raises what the last try raised."""
        pause = FIRST_PAUSE_SECONDS
        for tried in range(1, MOST_STARTS + 1):
            with self._loading:
                if self._closing.is_set():
                    return False
                # The channel may have moved meanwhile, which started it.
                if self._loaded:
                    return True
                assert self._release is not None
                try:
                    if self._process is None:
                        self._start()
                    self._take(self._release, self._ask(self._document(self._release), LOAD_SECONDS))
                    return True
                except (GoneError, ReaderError, ServiceError, OSError):
                    if tried == MOST_STARTS:
                        raise
            if self._closing.wait(pause):
                return False
            pause *= 2
        raise AssertionError

    # ---- its process

    def _start(self) -> None:
        python = environment("serving", requirements(), typer.echo)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))
        (package,) = shipreader.__path__
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-P", "-c", _START, package, self.model, str(self.port), json.dumps(asdict(self.limits))],
                cwd=self.folder,
                # It loads what others made, and has no use for the bucket.
                env={name: value for name, value in inherited(os.environ).items() if not name.startswith("PYTHON")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._replies = b""

    def _ask(self, document: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """One line there, one line back. Raises GoneError, and the process is no more then."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        ends = time.monotonic() + seconds
        line = json.dumps(document).encode() + b"\n"
        try:
            there, back = process.stdin.fileno(), process.stdout.fileno()
            while line and _can(there, select.POLLOUT, ends):
                line = line[os.write(there, line) :]
            while b"\n" not in self._replies and _can(back, select.POLLIN, ends):
                piece = os.read(back, 2**16)
                if not piece:
                    raise BrokenPipeError
                self._replies += piece
        except (OSError, ValueError):
            # Whatever is left of it is of no use.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            code = process.poll()
            raise self._gone(_ending(code) if code is not None else "it closed its output") from None
        if b"\n" not in self._replies:
            # Its answer, when it came, would be taken for that to the next question.
            raise self._gone(f"it did not answer within {seconds:g} s")
        answer, _, self._replies = self._replies.partition(b"\n")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def _gone(self, why: str) -> GoneError:
        """Take away what is left of the process."""
        process, self._process, self._loaded = self._process, None, False
        if process is not None:
            _end(process)
        return GoneError(why)

    def close(self) -> None:
        """Let it answer what it has, and end it."""
        self._closing.set()
        # Not for long: it may wait for a process that hangs.
        held = self._loading.acquire(timeout=1)
        process = self._process
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            _end(process)
        if held:
            self._loading.release()
        if self._keeper is not None:
            self._keeper.join()
        if self._process is not None:
            _end(self._process)


def _can(descriptor: int, what: int, ends: float) -> bool:
    """Whether it can be read or written before this time on the monotonic clock."""
    poll = select.poll()
    poll.register(descriptor, what)
    return bool(poll.poll(max(0.0, 1000 * (ends - time.monotonic()))))


def _end(process: subprocess.Popen[bytes]) -> None:
    """At once."""
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"it ended with {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"it was ended by {name}" + (", as the kernel does when memory is short" if name == "SIGKILL" else "")
    return f"it was ended by signal {-code}"

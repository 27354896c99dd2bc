"""What following processes say of themselves: a file each in the reader's folder, and pages for Prometheus and probes.

<folder>/readers/<random>.json   the status after the last look; belongs to a process while that holds the lock
<folder>/readers/<random>.lock
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any, ClassVar

from shipreader.errors import ReaderError

if TYPE_CHECKING:
    from shipreader.reader import Status

READERS = "readers"
CONNECTIONS, CONNECTION_SECONDS = 32, 20.0
"""At once, for probes and Prometheus; what one may last."""


class Report:
    """The file of one process. Writing it never fails: a full disk must not disturb what is followed."""

    def __init__(self, folder: Path) -> None:
        """folder: the reader's, which exists."""
        name, self._lock = uuid.uuid4().hex, None
        self._writing = Lock()
        self._path = folder / READERS / f"{name}.json"
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            draft = self._path.with_suffix(".new")
            self._lock = draft.open("w")
            # Locked before it has its name: one that is not locked is a dead process's.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(self._path.with_suffix(".lock"))

    def write(self, model: str, channel: str, status: Status) -> None:
        """Replace what was said before."""
        if self._lock is not None:
            with self._writing, contextlib.suppress(OSError):
                draft = self._path.with_suffix(".draft")
                draft.write_text(json.dumps(described(model, channel, status)))
                draft.replace(self._path)

    def close(self) -> None:
        """Take it away."""
        if self._lock is not None:
            for path in (self._path, self._path.with_suffix(".lock")):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self._lock.close()


def described(model: str, channel: str, status: Status) -> dict[str, Any]:
    """A status as JSON."""
    release = status.release
    return {
        "model": model,
        "channel": channel,
        "release": release.id if release is not None else None,
        "generation": release.generation if release is not None else None,
        "seen": status.seen,
        "checked_at": status.checked_at,
        "problem": status.problem,
        **_candidate(status),
    }


def _candidate(status: Status) -> dict[str, Any]:
    """What a rollout tries, where there is one, or why it is not tried here."""
    tried, said = status.candidate, dict[str, Any]()
    if tried is not None:
        said = {"candidate": tried.release.id, "share": tried.share / 10_000, "shadow": tried.shadow}
        said["rollout"] = tried.rollout
    return {**said, **({"rollout_problem": status.rollout_problem} if status.rollout_problem else {})}


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What the processes say that follow in this folder and live; what dead ones left is taken away."""
    found = []
    for lock in sorted((folder / READERS).glob("*.lock")):
        path = lock.with_suffix(".json")
        try:
            with lock.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            for left in (path, path.with_suffix(".draft"), lock):
                left.unlink(missing_ok=True)
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text()))
        except OSError:
            # It ended meanwhile, or is another user's.
            continue
    return found


def judged(report: dict[str, Any], max_stale: float | None) -> dict[str, Any]:
    """What a process said, as it is now: `seconds_since_check` in place of a time, and whether it is ready.

    max_stale: seconds, as `Status.ready` takes them.
    """
    stale = stale_seconds(report["checked_at"])
    said = {name: value for name, value in report.items() if name != "checked_at"}
    ready = is_ready(report["release"] is not None, stale, max_stale)
    return {**said, "seconds_since_check": None if stale is None else round(stale, 1), "ready": ready}


def stale_seconds(checked_at: float | None) -> float | None:
    """As `Status.stale_seconds`."""
    return None if checked_at is None else max(0.0, time.time() - checked_at)


def is_ready(serves: bool, stale: float | None, max_stale: float | None) -> bool:
    """As `Status.ready`. serves: whether there is a release."""
    return serves and (max_stale is None or (stale is not None and stale <= max_stale))


def metrics(model: str, channel: str, status: Status, max_stale: float | None = None) -> str:
    """What Prometheus reads of one reader; for a web server of your own.

    Args:
        model: its name.
        channel: what is followed.
        status: of the reader.
        max_stale: seconds, as `Status.ready` takes them.
    """
    labels = f'model="{model}",channel="{channel}"'
    stale = status.stale_seconds()
    values: list[tuple[str, str, str, float]] = [
        ("ready", "Whether requests may come.", "", int(status.ready(max_stale))),
        ("problem", "Whether what is live is not served, or could not be looked for.", "", int(bool(status.problem))),
        ("rollout_problem", "Whether a rollout is not followed.", "", int(bool(status.rollout_problem))),
    ]
    if status.release is not None:
        values.append(("generation", "Of the channel.", ',what="served"', status.release.generation))
    if status.seen is not None:
        values.append(("generation", "Of the channel.", ',what="seen"', status.seen))
    if (tried := status.candidate) is not None:
        what = f',release="{tried.release.id}",shadow="{str(tried.shadow).lower()}"'
        values.append(("candidate_share", "Of requests, by their key.", what, tried.share / 10_000))
    # A number also when it never was: an alert on a value that is not there stays silent.
    unknown = float("inf") if stale is None else stale
    values.append(("seconds_since_check", "Since what is served was last known to be live.", "", unknown))
    lines: list[str] = []
    for name, text, label, value in values:
        head = [f"# HELP shipreader_{name} {text}", f"# TYPE shipreader_{name} gauge"]
        shown = "+Inf" if value == float("inf") else value
        lines += [*(head if head[0] not in lines else []), f"shipreader_{name}{{{labels}{label}}} {shown}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Page:
    code: int
    body: str


@contextlib.contextmanager
def answering(
    host: str, port: int, model: str, channel: str, status: Callable[[], Status], max_stale: float | None
) -> Iterator[int]:
    """Answer GET /metrics, /ready (200 or 503) and /live while the block runs; gives the port.

    Args:
        host: address to listen on.
        port: of it; 0 takes a free one.
        model: its name.
        channel: what is followed.
        status: of the reader, asked for each request.
        max_stale: seconds, as `Status.ready` takes them.

    Raises:
        ReaderError: an address that is not this machine's, or a port that is taken.
    """

    def page(path: str) -> _Page:
        now = status()
        if path == "/metrics":
            return _Page(200, metrics(model, channel, now, max_stale))
        if path == "/ready":
            said = json.dumps(described(model, channel, now)) + "\n"
            return _Page(200 if now.ready(max_stale) else 503, said)
        return _Page(200, "following\n") if path == "/live" else _Page(404, "expected /metrics, /ready or /live\n")

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            found = page(self.path.partition("?")[0])
            body = found.body.encode()
            self.send_response(found.code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A probe every few seconds is nothing to write down."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        places = BoundedSemaphore(CONNECTIONS)
        opened: ClassVar[dict[socket.socket, float]] = {}

        def process_request(self, request: Any, client_address: Any) -> None:
            if not self.places.acquire(blocking=False):
                self.shutdown_request(request)
                return
            self.opened[request] = time.monotonic()
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.opened.pop(request, None)
                self.places.release()

        def service_actions(self) -> None:
            """Ten times a second: whoever sends a letter now and then would stay for ever."""
            for request, began in list(self.opened.items()):
                if time.monotonic() > began + CONNECTION_SECONDS:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Of who hung up there is nothing to write down."""
            if not isinstance(sys.exc_info()[1], OSError):
                super().handle_error(request, client_address)

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise ReaderError(f"expected to listen on port {port} of {host}: {error.strerror or error}") from error
    Thread(target=server.serve_forever, args=(0.1,), name="shipreader-status", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()

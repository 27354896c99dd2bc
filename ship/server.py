"""The server of `ship serve`: loads what it is told to, and is started again with that when it ended or hangs."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from shipreader.errors import ReaderError, RefusedError
from shipreader.inference_limits import LOOPBACK, Limits
from shipreader.kept import kept_by_job
from shipreader.mlserver import BATCH_SIZE, require_datatypes, rows_together, served
from shipreader.records import Release
from shipreader.rollouts import Candidate
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.ports import port_holder, port_is_free
from train_and_ship.infra.processes import last_lines
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.server_process import GoneError, ServerProcess

LOAD_SECONDS = 300
LOOK_SECONDS, HEALTH_SECONDS, ANSWER_SECONDS = 0.5, 5.0, 30.0
"""Between two looks at the process; between two questions to it; for its answer."""
MOST_STARTS, FIRST_PAUSE_SECONDS = 5, 1.0
"""In a row to bring it back, with a pause after the first that doubles."""
MOST_DEATHS = 2
"""With one release that it is to load: then that release is not tried again."""
MOST_LOSSES, CALM_SECONDS = 5, 600.0
"""So often it may be gone within so long; then something is wrong that a start does not mend."""

_log = logging.getLogger(__name__)


def requirements() -> list[str]:
    """What the serving environment holds, each with its version and the hashes of all its wheels."""
    text = Path(__file__).with_name("serving-requirements.txt").read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if not line.lstrip().startswith("#") and line.strip()]


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
    _process: ServerProcess | None = None
    _release: Release | None = None
    """What it served last."""
    _loaded: bool = False
    """Whether the process that runs serves that."""
    _deadly: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How often it ended when it was to load a release."""
    _trying: str = ""
    """The rollout whose candidate the process was told to try."""
    _tried_deadly: set[str] = field(default_factory=set)
    """Rollouts during which it ended: a crash takes requests along, so their candidates are not tried again."""
    _note_candidate: Callable[[str], None] = lambda problem: None
    _is_tried: Callable[[], bool] = lambda: True
    _candidate_problem: str = ""
    """What was said of the candidate last."""
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
            if self._process is not None:
                try:
                    self._process.require_runs()
                except GoneError:
                    # By itself: not this release's fault.
                    self._let_go()
            try:
                if self._process is None:
                    self._start()
                reply = self._ask(document)
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

    def try_candidate(self, candidate: Candidate | None) -> None:
        """Have a part of the requests answered by a candidate, or all by what is live again.

        It returns before the candidate is loaded; `keep` tells what is wrong with it. Raises ReaderError where the
        process is not to load it: it ended with one of this rollout, or is being started again.
        """
        with self._loading:
            if candidate is None:
                self._say_of_candidate("")
                if not self._trying:
                    return
            elif candidate.rollout in self._tried_deadly:
                raise RefusedError(f"the server ended while it tried this candidate; its log is {self.log}")
            elif not self._loaded:
                raise ReaderError("the server is being started again")
            self._trying = candidate.rollout if candidate is not None else ""
            try:
                self._ask({"candidate": self._candidate_document(candidate) if candidate is not None else None})
            except GoneError as error:
                raise ReaderError(f"the server is gone: {error}") from error

    def _candidate_document(self, candidate: Candidate) -> dict[str, object]:
        release = candidate.release
        version = f"{release.generation}-{release.id}"
        names = ("share", "key", "fallback_ms", "shadow", "rollout", "number")
        said = {name: getattr(candidate, name) for name in names}
        return {"model": {**self._document(release), "version": version}, **said}

    def require_servable(self, release: Release) -> None:
        """Raises ReaderError for a release that no server of this kind can load, as far as its manifest says."""
        self._document(release)

    def _document(self, release: Release) -> dict[str, object]:
        signature = release.manifest.signature
        require_datatypes(signature)
        kept = kept_by_job(release)
        return {
            "model": release.model,
            "generation": release.generation,
            "artifact": str(release.artifact(served(release))),
            "signature": dict(signature),
            "batch_size": rows_together(signature, self.batch_size),
            "release": release.id,
            "observe": asdict(kept) if kept is not None else None,
        }

    def _take(self, release: Release, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise RefusedError(f"the server did not load it ({reply['error']}); its log is {self.log}")
        # It tries nothing beside a release that it has just loaded.
        self._release, self._loaded, self.threads, self._trying = release, True, reply["threads"], ""

    # ---- whether it does

    def keep(
        self,
        note: Callable[[str], None],
        fresh: Callable[[], bool],
        note_candidate: Callable[[str], None] = lambda problem: None,
        tried: Callable[[], bool] = lambda: True,
    ) -> None:
        """Watch the process in a thread from now on, and start it again when it ended or hangs.

        Args:
            note: told what is wrong, and an empty text when it serves again.
            fresh: whether what is served is known to be live; the process is told, and is ready only then.
            note_candidate: told why a candidate gets no requests, and an empty text when it does again.
            tried: whether a rollout runs still; the process is told, and lets go of the candidate when none does: the
                release that ended it may take long to come.
        """
        self._note_candidate, self._is_tried = note_candidate, tried
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
        try:
            self._process.require_runs()
            if fresh is None:
                return
            reply = self._process.ask({"fresh": fresh(), "tried": self._is_tried()}, ANSWER_SECONDS)
            if self._trying:
                self._say_of_candidate(reply["canary"])
            computing = reply["computing"]
            if computing > self.limits.compute_seconds:
                raise GoneError(f"it computes one batch for {computing:.0f} s already")
        except GoneError:
            self._let_go()
            raise

    def _say_of_candidate(self, problem: str) -> None:
        if problem != self._candidate_problem:
            self._candidate_problem = problem
            self._note_candidate(problem)

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
                    self._take(self._release, self._ask(self._document(self._release)))
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
        arguments = [self.model, str(self.port), json.dumps(asdict(self.limits))]
        self._process = ServerProcess(python, self.log, arguments)

    def _ask(self, document: dict[str, object]) -> dict[str, Any]:
        """Have it load a release. Raises GoneError."""
        assert self._process is not None
        try:
            return self._process.ask(document, LOAD_SECONDS)
        except GoneError:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Take away what is left of the process."""
        if self._trying:
            # It may have been that: what is live comes back without it.
            self._tried_deadly.add(self._trying)
            self._say_of_candidate("the server ended while it tried the candidate, and is started again without it")
        process, self._process, self._loaded, self._trying = self._process, None, False, ""
        if process is not None:
            process.end()

    def close(self) -> None:
        """Let it answer what it has, and end it."""
        self._closing.set()
        # Not for long: it may wait for a process that hangs.
        held = self._loading.acquire(timeout=1)
        if self._process is not None:
            self._process.close()
        if held:
            self._loading.release()
        if self._keeper is not None:
            self._keeper.join()
        if self._process is not None:
            self._process.end()

"""Follow a channel: what is live in the bucket becomes `current` on this machine, verified, or stays out.

reader = Reader("digits", bucket="models", folder="/srv/digits", on_change=load)
with reader:                      # the first release is here, or the constructor's mistakes have been named
    ...                           # `load(release)` is called for each that follows

Reader("digits", bucket="models", folder="/srv/digits").pull()      # once
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shipreader.bucket import Bucket, NotModifiedError, s3_client
from shipreader.errors import NothingLiveError, ReaderError, RefusedError, UnavailableError
from shipreader.local import LocalFolder, State
from shipreader.records import POINTER_BYTES, Manifest, Pointer, Release, decode_pointer, pointer_key
from shipreader.releases import Releases
from shipreader.report import Report, is_ready, stale_seconds
from shipreader.signatures import load_keys

LONGEST_PAUSE_SECONDS = 300.0
"""Between two downloads of a release that was refused, and two calls of `on_change` that failed with one; another move
of the channel is tried at once."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """For a health check."""

    release: Release | None
    """What is served: the last release with which `on_change` has succeeded."""
    checked_at: float | None
    """When the bucket was last found to agree with what is served, in seconds since the epoch."""
    problem: str
    """Why what is live is not served, or could not be looked for; empty when all is well."""
    seen: int | None = None
    """The channel's generation when it was last read; None before that."""
    checked_clock: float | None = None
    """`checked_at` on this machine's monotonic clock, which nobody sets."""

    def stale_seconds(self) -> float | None:
        """For how long nobody has known whether what is served is live; None when that was never known."""
        stale = stale_seconds(self.checked_at)
        if stale is None or self.checked_clock is None:
            return stale
        # Whoever sets the clock back would make it fresh.
        return max(stale, time.monotonic() - self.checked_clock)

    def ready(self, max_stale: float | None = None) -> bool:
        """Whether requests may come: something is served, and known to be live at most `max_stale` seconds ago."""
        return is_ready(self.release is not None, self.stale_seconds(), max_stale)


class Reader:
    """One channel of one model in one folder. Safe to use from many threads; several processes may share the folder.

    A release becomes current only after its manifest and every file have the hashes that the pointer and the manifest
    say, the signature (where keys are given) holds, and `accept` did not object. Generations never go back: a rollback
    has a higher one. The current release and the one before stay on disk.
    """

    def __init__(
        self,
        model: str,
        *,
        bucket: str,
        folder: str | Path,
        channel: str = "prod",
        client: Any = None,
        public_keys: Iterable[str | Path] = (),
        interval: float = 10.0,
        jitter: float = 0.2,
        max_bytes: int | None = None,
        accept: Callable[[Release], None] | None = None,
        on_change: Callable[[Release], None] | None = None,
    ) -> None:
        """What to follow, and where it goes.

        Args:
            model: its name in the bucket.
            bucket: the bucket's name.
            folder: of this machine, where releases are kept; `current` in it leads to the one to serve.
            channel: the channel to follow.
            client: a boto3 S3 client; None makes one from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, …).
            public_keys: PEM files; when any are given, a release has to be signed by one of them.
            interval: seconds between looks at the channel.
            jitter: the part of it that is random, 0 to 1.
            max_bytes: releases that take more, with 4 KiB for each file and folder, are refused; None: no limit.
            accept: called with a verified release before it becomes current; whatever it raises keeps it out.
            on_change: called after a release became current, and again, ever more seldom, until it has succeeded with
                it: the release before is what `status` says is served until then, and stays on disk.

        Raises:
            ReaderError: an interval, a jitter or a name that cannot be.
        """
        self._key = pointer_key(model, channel)
        if not interval > 0 or not 0 <= jitter <= 1:
            raise ReaderError(f"expected an interval above 0 and a jitter from 0 to 1, got {interval} and {jitter}")
        self.model, self.channel = model, channel
        keys = load_keys(public_keys)
        self._bucket = Bucket(client if client is not None else s3_client(), bucket)
        self._local = LocalFolder(Path(folder))
        self._releases = Releases(self._bucket, self._local, keys, max_bytes)
        self._interval, self._jitter = interval, jitter
        self._accept, self._on_change = accept, on_change
        self._working, self._stopping = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._state: State | None = None
        self._current: Release | None = None
        self._served: Release | None = None
        self._seen: int | None = None
        self._looked: tuple[float, float] | None = None
        """When: since the epoch, and on the monotonic clock."""
        self._checked: tuple[float, float] | None = None
        self._look_problem = self._change_problem = self._fault = ""
        self._changing = threading.RLock()
        self._inside_change = False
        self._refused: _Failure | None = None
        self._failed: _Failure | None = None
        self._report: Report | None = None

    # ---- what there is

    @property
    def current(self) -> Release | None:
        """The release to serve; None before the first one is here."""
        return self._current

    def status(self) -> Status:
        """What is served, and what is wrong."""
        problem = self._fault or self._look_problem or self._change_problem
        at, clock = self._checked or (None, None)
        return Status(None if self._fault else self._served, at, problem, self._seen, clock)

    def note_fault(self, problem: str) -> None:
        """For who serves what `on_change` was given: why it is not served any more, or an empty text when it is again.

        Until then `status` says so, and that nothing is served; the channel is followed all the same.
        """
        self._fault = problem
        self._say()

    def pull(self) -> Release:
        """Look at the channel once and follow it.

        Raises UnavailableError or RefusedError, and what was current before still is then; or what `on_change` raises.
        """
        with self._working:
            release = self._observed(lambda: self._follow(None))
        self._announce()
        return release

    # ---- in the background

    def start(self) -> Release:
        """Follow the channel in a thread of its own. Returns once there is something to serve.

        What an earlier process left in the folder will do when the bucket does not answer, or holds something bad.
        Raises UnavailableError or RefusedError when there is neither.
        """
        if self._thread is not None:
            raise ReaderError("this reader was started already")
        release = self._first()
        self._report = Report(self._local.folder)
        self._say()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name=f"shipreader-{self.model}-{self.channel}", daemon=True)
        self._thread.start()
        return release

    def close(self) -> None:
        """Stop following; `current` stays."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        if self._report is not None:
            self._report.close()
            self._report = None

    def __enter__(self) -> Reader:
        if self._thread is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _first(self) -> Release:
        try:
            with self._working:
                release = self._observed(lambda: self._follow(None))
        except (UnavailableError, RefusedError, OSError) as error:
            kept = self.current
            if kept is None:
                raise
            _log.warning("%s %s: serving release %s, kept from before: %s", self.model, self.channel, kept.id, error)
            release = kept
        self._announce()
        return release

    def _run(self) -> None:
        said = self.status().problem
        while not self._stopping.wait(self._interval * random.uniform(1 - self._jitter, 1 + self._jitter)):
            try:
                with self._working:
                    self._observed(lambda: self._follow(self._refused))
                problem = ""
            except (Exception, SystemExit) as error:
                # Whatever it is, a thread that ended would leave this machine behind without a word.
                problem = f"{error}" if isinstance(error, (ReaderError, OSError)) else repr(error)
            # What was seen, also while `on_change` is at work.
            self._say()
            # Also while the bucket is away: what is here may not be served yet.
            self._announce()
            self._say()
            problem = problem or self._change_problem
            # Each thing once: a bucket that is down for a night is one line.
            if problem != said:
                kept = self._served.id if self._served else "none"
                if problem:
                    _log.error("%s %s: still serving release %s: %s", self.model, self.channel, kept, problem)
                else:
                    _log.warning("%s %s: following the channel again", self.model, self.channel)
            said = problem

    def _announce(self) -> None:
        """Give what is current to `on_change`, unless it has it already. Raises what that raises, but in our thread."""
        with self._changing:
            release, failed = self._current, self._failed
            # `on_change` may look at the channel itself.
            if release is None or release == self._served or self._inside_change:
                return
            ours = self._thread is threading.current_thread()
            if ours and failed is not None and failed.rests(release):
                return
            again = failed is not None and failed.with_what == release
            if not again:
                _log.info("%s %s: generation %d, release %s", self.model, self.channel, release.generation, release.id)
            self._inside_change = True
            try:
                if self._on_change is not None:
                    self._on_change(release)
            except (Exception, SystemExit) as error:
                self._failed = _Failure.after(failed, release, error, self._interval)
                self._change_problem = f"on_change failed for release {release.id}: {type(error).__name__}: {error}"
                if not ours:
                    raise
                if not again:
                    _log.exception("%s %s: on_change failed for release %s", self.model, self.channel, release.id)
                return
            finally:
                self._inside_change = False
            self._failed, self._change_problem, self._served = None, "", release
            if not self._look_problem:
                # Not now: what it did may have taken long.
                self._checked = self._looked

    def _observed(self, follow: Callable[[], Release]) -> Release:
        """Call it and keep the status."""
        try:
            release = follow()
        except Exception as error:
            self._look_problem = str(error) or repr(error)
            raise
        self._current, self._look_problem = release, ""
        if release == self._served:
            self._checked = self._looked
        return release

    def _waits(self, words: str) -> None:
        """For another process in the folder: said while it lasts, not when it is over."""
        self._look_problem = words
        _log.warning("%s %s: %s", self.model, self.channel, words)
        self._say()

    def _stopped(self) -> bool:
        return self._stopping.is_set() and self._thread is threading.current_thread()

    def _say(self) -> None:
        """Leave word for whoever asks on this machine (`shipreader MODEL --to FOLDER --status`)."""
        if self._report is not None:
            self._report.write(self.model, self.channel, self.status())

    # ---- one look, under the lock

    def _follow(self, refused: _Failure | None) -> Release:
        with self._local.locked(self._waits, self._stopped):
            held = self._held()
            known = self._state.etag if held is not None and self._state is not None else None
            try:
                found = self._bucket.changed(self._key, known, POINTER_BYTES)
            except NotModifiedError:
                assert held is not None
                self._refused, self._seen, self._looked = None, held.generation, _now()
                return held
            if found is None:
                raise NothingLiveError(f"s3://{self._bucket.name}/{self._key}: nothing is live on {self.channel}")
            pointer, etag = decode_pointer(found[0], self.model, self.channel), found[1]
            self._seen, self._looked = pointer.generation, _now()
            if refused is not None and refused.rests(etag):
                raise refused.error
            try:
                self._require_newer(pointer)
                release = self._release(self._releases.bring(pointer), pointer)
                if self._accept is not None:
                    self._require_accepted(release)
            except (RefusedError, UnavailableError) as error:
                if isinstance(error, RefusedError) or _forbidden(error):
                    self._refused = _Failure.after(self._refused, etag, error, self._interval * 2)
                raise
            self._refused = None
            return self._switch(release, State(self._bucket.name, pointer, etag, self._previous(pointer)))

    def _held(self) -> Release | None:
        """What the folder has, verified when this process sees it for the first time."""
        state = self._local.state()
        if state is None:
            self._state = None
            return None
        pointer = state.pointer
        if (state.bucket, pointer.model, pointer.channel) != (self._bucket.name, self.model, self.channel):
            raise ReaderError(
                f"{self._local.folder}: expected the folder of s3://{self._bucket.name} {self.model} {self.channel}, "
                f"got that of s3://{state.bucket} {pointer.model} {pointer.channel}; choose another folder"
            )
        current = self.current
        if state == self._state and current is not None:
            return current
        self._state = state
        try:
            manifest = self._releases.kept(pointer)
        except RefusedError as error:
            _log.warning("%s %s: what is on disk cannot be served: %s", self.model, self.channel, error)
            return None
        self._local.point(pointer.release)
        release = self._release(manifest, pointer)
        self._current = release
        return release

    def _require_newer(self, pointer: Pointer) -> None:
        if self._state is None:
            return
        held = self._state.pointer
        if pointer.generation < held.generation or (pointer.generation == held.generation and pointer != held):
            raise RefusedError(
                f"{self._key}: expected generation {held.generation} or later, got another {pointer.generation}: "
                "the bucket went back in time (a restored backup?). Move the channel anew, or delete "
                f"{self._local.folder} to follow it"
            )

    def _require_accepted(self, release: Release) -> None:
        assert self._accept is not None
        try:
            self._accept(release)
        except (Exception, SystemExit) as error:
            raise RefusedError(f"release {release.id} was not accepted: {type(error).__name__}: {error}") from error

    def _previous(self, pointer: Pointer) -> str | None:
        if self._state is None:
            return None
        held = self._state.pointer.release
        return held if held != pointer.release else self._state.previous

    def _switch(self, release: Release, state: State) -> Release:
        self._local.switch(state)
        self._state = state
        served = self._served.id if self._served is not None else None
        self._local.prune({name for name in (release.id, state.previous, served) if name is not None})
        return release

    def _release(self, manifest: Manifest, pointer: Pointer) -> Release:
        folder = self._local.release(pointer.release)
        return Release(self.channel, pointer.generation, folder, manifest, pointer.moved_at)


def _forbidden(error: UnavailableError) -> bool:
    """Whether the store refused an object, and not all that these credentials ask for: they had the pointer.

    It will refuse it again, and the other files would be downloaded each time.
    """
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 403


def _now() -> tuple[float, float]:
    return time.time(), time.monotonic()


@dataclass(frozen=True)
class _Failure:
    """Something that is tried again, ever more seldom."""

    with_what: object
    """The ETag of a pointer that led to something bad, or the release with which `on_change` failed."""
    error: BaseException
    pause: float
    until: float
    """On the monotonic clock: not tried again before."""

    @staticmethod
    def after(earlier: _Failure | None, with_what: object, error: BaseException, first: float) -> _Failure:
        """first: seconds to the second try; twice as many to each that follows."""
        if earlier is not None and earlier.with_what == with_what:
            first = earlier.pause * 2
        pause = min(LONGEST_PAUSE_SECONDS, first)
        return _Failure(with_what, error, pause, time.monotonic() + pause)

    def rests(self, with_what: object) -> bool:
        """Whether it is too early to try this again."""
        return self.with_what == with_what and time.monotonic() < self.until

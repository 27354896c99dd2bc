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

from shipreader.bucket import Bucket, NotModifiedError, is_forbidden, s3_client
from shipreader.errors import NothingLiveError, ReaderError, RefusedError, StoppedError, UnavailableError
from shipreader.local import LocalFolder, State
from shipreader.records import POINTER_BYTES, Manifest, Pointer, Release, decode_pointer, pointer_key
from shipreader.releases import Releases
from shipreader.report import Report, is_ready, stale_seconds
from shipreader.retries import Failure
from shipreader.rollouts import Candidate, Rollouts
from shipreader.signatures import load_keys

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
    candidate: Candidate | None = None
    """What is tried beside it: the last candidate with which `on_rollout` has succeeded; None while nothing is."""
    rollout_problem: str = ""
    """Why a rollout that runs is not followed; what is live is served all the same."""

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

    With `rollouts` or `on_rollout` it follows rollouts too, with one more conditional GET a look: a candidate is
    brought beside what is live when it is verified in the same way, has the same inputs and outputs, and `accept` did
    not object. Whatever is wrong with it, what is live is followed and served.
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
        on_rollout: Callable[[Candidate | None], None] | None = None,
        rollouts: bool = False,
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
            accept: called with a verified release before it becomes current, or a candidate (`release.rollout` says
                which it is); whatever it raises keeps it out.
            on_change: called after a release became current, and again, ever more seldom, until it has succeeded with
                it: the release before is what `status` says is served until then, and stays on disk.
            on_rollout: called with the candidate when there is another one, or its share or how it is asked changed,
                and with None when there is none any more; again, ever more seldom, until it has succeeded. Makes the
                reader follow rollouts.
            rollouts: follow them also without `on_rollout`, for who asks `candidate`.

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
        self._accept, self._on_change, self._on_rollout = accept, on_change, on_rollout
        self._rollouts: Rollouts | None = None
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
        self._refused: Failure | None = None
        self._failed: Failure | None = None
        self._tried: Candidate | None = None
        self._rollout_failed: Failure | None = None
        self._rollout_fault = self._rollout_said = ""
        self._peeking, self._peeked = threading.Lock(), 0.0
        if rollouts or on_rollout is not None:
            self._follow_rollouts()
        self._report: Report | None = None

    # ---- what there is

    @property
    def current(self) -> Release | None:
        """The release to serve; None before the first one is here."""
        return self._current

    @property
    def candidate(self) -> Candidate | None:
        """What is tried beside `current`; None while nothing is, or it cannot be had."""
        return self._rollouts.candidate if self._rollouts is not None else None

    def status(self) -> Status:
        """What is served, and what is wrong."""
        problem = self._fault or self._look_problem or self._change_problem
        at, clock = self._checked or (None, None)
        served, tried = (self._served, self._tried if self.candidate else None) if not self._fault else (None, None)
        return Status(served, at, problem, self._seen, clock, tried, self._rollout_problem())

    def hand_over(self, on_change: Callable[[Release], None], on_rollout: Callable[[Candidate | None], None]) -> None:
        """For who serves both releases (shipreader/canary.py): the callbacks of a reader that was given none.

        Raises ReaderError for one that has callbacks already, or was started.
        """
        if self._on_change is not None or self._on_rollout is not None or self._current is not None:
            raise ReaderError("expected a reader without on_change and on_rollout that was not started yet")
        self._on_change, self._on_rollout = on_change, on_rollout
        self._follow_rollouts()

    def note_rollout_fault(self, problem: str) -> None:
        """For who serves the candidate: why it gets no requests here any more, or an empty text when it does again."""
        self._rollout_fault = problem
        self._say_rollout()
        self._say()

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
        self._look_at_rollout()
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
        # The candidate is not waited for before anything is served.
        pause = 0.0 if self._rollouts is not None else self._pause()
        while not self._stopping.wait(pause):
            pause = self._pause()
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
            # Last: a candidate may take long to come, and nothing of it holds up what is live.
            self._look_at_rollout(ask=not problem)
            problem = problem or self._change_problem
            # Each thing once: a bucket that is down for a night is one line.
            if problem != said:
                kept = self._served.id if self._served else "none"
                if problem:
                    _log.error("%s %s: still serving release %s: %s", self.model, self.channel, kept, problem)
                else:
                    _log.warning("%s %s: following the channel again", self.model, self.channel)
            said = problem

    def _pause(self) -> float:
        return self._interval * random.uniform(1 - self._jitter, 1 + self._jitter)

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
                self._failed = Failure.after(failed, release, error, self._interval)
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

    def _announce_rollout(self) -> None:
        """Give the candidate to `on_rollout`, unless it has it already. What that raises is said, and tried again."""
        with self._changing:
            candidate, failed = self.candidate, self._rollout_failed
            # Beside a release that is not served yet nothing is tried.
            if candidate is not None and self._current != self._served:
                candidate = None
            if candidate == self._tried or self._inside_change:
                if candidate is None:
                    self._rollout_failed = None
            elif failed is None or not failed.rests(candidate):
                self._inside_change = True
                try:
                    if self._on_rollout is not None:
                        self._on_rollout(candidate)
                    self._tried, self._rollout_failed = candidate, None
                    said = f"{candidate}" if candidate is not None else "no candidate any more"
                    _log.info("%s %s: %s", self.model, self.channel, said)
                except (Exception, SystemExit) as error:
                    self._tried = None
                    self._rollout_failed = Failure.after(failed, candidate, error, self._interval)
                finally:
                    self._inside_change = False
        self._say_rollout()

    def _rollout_problem(self) -> str:
        failed = self._rollout_failed
        failure = f"on_rollout failed: {type(failed.error).__name__}: {failed.error}" if failed is not None else ""
        return (self._rollouts.problem if self._rollouts is not None else "") or failure or self._rollout_fault

    def _say_rollout(self) -> None:
        """Each thing once, in the log."""
        if self._rollouts is None:
            return
        said = self._rollout_problem() or self._rollouts.unseen
        if said and said != self._rollout_said:
            _log.warning("%s %s: the live release answers all: %s", self.model, self.channel, said)
        self._rollout_said = said

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

    def _follow(self, refused: Failure | None) -> Release:
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
            if self._rollouts is not None:
                # Whoever moved the channel has ended it, whether or not that release can be had.
                self._rollouts.void_unless(pointer)
            if refused is not None and refused.rests(etag):
                raise refused.error
            try:
                self._require_newer(pointer)
                release = self._release(self._releases.bring(pointer), pointer)
                if self._accept is not None:
                    self._require_accepted(release)
            except (RefusedError, UnavailableError) as error:
                if isinstance(error, RefusedError) or is_forbidden(error):
                    self._refused = Failure.after(self._refused, etag, error, self._interval * 2)
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
        if self._rollouts is not None:
            # Another process of this folder saw the channel move.
            self._rollouts.void_unless(pointer)
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

    def _follow_rollouts(self) -> None:
        if self._rollouts is None:
            self._rollouts = Rollouts(
                self._bucket, self._local, self._releases, self.model, self.channel, self._interval * 2
            )

    def _look_at_rollout(self, *, ask: bool = True) -> None:
        """Follow it and say so. Never raises. ask: whether the channel was read, and the rollout may be asked for."""
        if self._rollouts is None:
            return
        try:
            if ask:
                with self._working, self._local.locked(stopped=self._stopped):
                    self._ask_for_rollout(self._rollouts)
        except (Exception, SystemExit) as error:
            self._rollouts.problem = str(error) if isinstance(error, (ReaderError, OSError)) else repr(error)
        self._announce_rollout()
        self._say()

    def _ask_for_rollout(self, rollouts: Rollouts) -> None:
        live, served, state = self._current, self._served, self._state
        # Another process may have moved the folder on meanwhile: the next look goes by that.
        if live is None or state is None or self._local.state() != state:
            return
        stays = {name for name in (live.id, state.previous, served.id if served else None) if name is not None}
        accept = self._require_accepted if self._accept is not None else _nothing
        rollouts.look(state.pointer, live, stays, accept, self._interrupt)

    def _interrupt(self) -> None:
        """Raises StoppedError when a candidate that is being downloaded has to wait: from the threads that do that."""
        with self._peeking:
            if self._stopping.is_set() and self._thread is not None:
                raise StoppedError("the reader is being closed")
            if time.monotonic() < self._peeked + self._interval or self._state is None:
                return
            self._peeked = time.monotonic()
            try:
                self._bucket.changed(self._key, self._state.etag, POINTER_BYTES)
            except NotModifiedError:
                return
            except ReaderError:
                # Whatever it is, the next look says it.
                return
        raise StoppedError("the channel moved while the candidate was brought")

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
        keep = {name for name in (release.id, state.previous, served) if name is not None}
        self._local.prune(keep | self._local.kept_candidate(release.generation))
        return release

    def _release(self, manifest: Manifest, pointer: Pointer) -> Release:
        folder = self._local.release(pointer.release)
        return Release(self.channel, pointer.generation, folder, manifest, pointer.moved_at)


def _nothing(release: Release) -> None:
    """Accept it."""


def _now() -> tuple[float, float]:
    return time.time(), time.monotonic()

"""What is live and the candidate of a rollout side by side in a server of your own: no request fails by the candidate.

split = Split(reader, load)                     # before reader.start(); load(release) gives what answers requests
with reader:
    answer = split.call(user_id, request)       # answer.value, answer.release, answer.arm
    chosen = split.split(user_id)               # or: whom to ask, for who asks by itself (chosen.loaded)
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shipreader.errors import ReaderError
from shipreader.fallbacks import SHADOW_SHARE, SHADOW_WAITING, Allowance, rest_after, words
from shipreader.observation_files import CANDIDATE, LIVE
from shipreader.reader import Reader
from shipreader.records import Release
from shipreader.rollouts import Candidate
from shipreader.split import slot_of

MOST_LATE = 32
"""Candidates that compute beyond their deadline at once; beyond that, requests go to the live release."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A release, and what `load` made of it."""

    release: Release
    loaded: Any


@dataclass(frozen=True)
class Chosen:
    """Whom to ask for one request."""

    arm: str
    """`live` or `candidate`."""
    release: Release
    loaded: Any
    """What `load` made of the release."""
    live: Loaded
    """For who falls back."""
    slot: int | None
    """Of the key, 0 to 9,999; None without a rollout or a key."""
    rollout: str
    """The rollout's id, or empty."""
    _tried: _Tried | None


@dataclass(frozen=True)
class Answer:
    """What answered one request."""

    value: Any
    release: Release
    """That gave the value."""
    arm: str
    """`live` or `candidate`: whose value it is."""
    slot: int | None
    rollout: str
    fell_back: bool = False
    """Whether the candidate was asked first, and raised or was late."""
    error: str = ""
    """The name of what it raised; `TimeoutError` for late."""


@dataclass(frozen=True)
class Shadow:
    """What a candidate made of a request beside the live release."""

    request: Any
    live: Any
    """The value that was answered."""
    value: Any
    """The candidate's; None where it raised."""
    error: BaseException | None
    seconds: float
    """That the candidate took."""
    candidate: Candidate
    slot: int


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    loaded: Any
    allowance: Allowance


class Split:
    """Holds what `load` made of both releases, and answers by one of them. Safe to use from many threads.

    A request whose candidate raises, or takes longer than the rollout's `fallback_ms`, is answered by the live release.
    When that happens to more than 50 of 1,000 requests, this process leaves all to the live release until the rollout
    changes, and the reader's status says so. With `shadow` the live release answers all; the candidate is asked by one
    thread, for which 8 requests wait at most, and which computes for a fifth of the time at most.
    """

    def __init__(
        self,
        reader: Reader,
        load: Callable[[Release], Any],
        *,
        on_shadow: Callable[[Shadow], None] | None = None,
        shadow_share: float = SHADOW_SHARE,
    ) -> None:
        """Take over the callbacks of a reader that was not started yet.

        Args:
            reader: it has no `on_change` and no `on_rollout`.
            load: makes of a release what answers requests; `call` wants something that takes a request. What it raises
                keeps the release before.
            on_shadow: called for each request that the candidate was asked on the side, in the thread that asks.
            shadow_share: of the time that this thread may compute, above 0 and at most 1.

        Raises:
            ReaderError: a reader with callbacks or one that was started; a share that cannot be.
        """
        if not 0 < shadow_share <= 1:
            raise ReaderError(f"shadow_share: expected more than 0 and at most 1, got {shadow_share}")
        self._reader, self._load, self._on_shadow = reader, load, on_shadow
        self._live: Loaded | None = None
        self._tried: _Tried | None = None
        self._places = threading.BoundedSemaphore(MOST_LATE)
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._waiting: queue.Queue[tuple[_Tried, int, Any, Any]] = queue.Queue(SHADOW_WAITING)
        self._shadow_share = shadow_share
        self._shadowing: threading.Thread | None = None
        reader.hand_over(self._on_change, self._on_rollout)

    def counts(self) -> dict[str, int]:
        """Requests since the start: `live`, `candidate`, `fell back`; on the side: `shadow`, `dropped`."""
        with self._counting:
            return dict(self._counts)

    # ---- one request

    def split(self, key: object) -> Chosen:
        """Whom to ask for a request with this key, for who asks by itself.

        Raises ReaderError while nothing is loaded.
        """
        live, tried = self._live, self._tried
        if live is None:
            raise ReaderError("expected a reader that was started: nothing is loaded yet")
        slot, rollout = None, ""
        # Whoever moves the channel ends a rollout at once, not when the callbacks were called.
        if tried is not None and (now := self._reader.candidate) is not None and now.rollout == tried.candidate.rollout:
            tried.allowance.request()
            slot, rollout = slot_of(self._reader.model, key), now.rollout
            if slot is not None and slot < tried.candidate.share and not tried.allowance.spent:
                if not tried.candidate.shadow:
                    return Chosen(CANDIDATE, tried.candidate.release, tried.loaded, live, slot, rollout, tried)
                return Chosen(LIVE, live.release, live.loaded, live, slot, rollout, tried)
        return Chosen(LIVE, live.release, live.loaded, live, slot, rollout, None)

    def call(self, key: object, request: Any) -> Answer:
        """Ask the release that this key is for. Raises what the live one raises, and ReaderError as `split` does."""
        chosen = self.split(key)
        tried, failure = chosen._tried, ""
        if chosen.arm == CANDIDATE:
            assert tried is not None
            try:
                value = self._in_time(chosen.loaded, request, tried.candidate.fallback_ms / 1000)
            except (Exception, SystemExit) as error:
                failure = type(error).__name__
            else:
                self._count(CANDIDATE)
                return Answer(value, chosen.release, CANDIDATE, chosen.slot, chosen.rollout)
        live = chosen.live
        value = live.loaded(request)
        if failure:
            # Of a request that the live release does not answer either, the candidate is not to blame.
            self.fell_back(chosen, failure)
        elif tried is not None:
            assert chosen.slot is not None
            self._ask_on_the_side(tried, chosen.slot, request, value)
        self._count(LIVE)
        return Answer(value, live.release, LIVE, chosen.slot, chosen.rollout, bool(failure), failure)

    def fell_back(self, chosen: Chosen, why: str) -> None:
        """Say that a candidate did not answer, and the live release did: for who asks by itself.

        chosen: what `split` gave. why: in a word, such as the name of what was raised.
        """
        self._count("fell back")
        if chosen._tried is not None and chosen._tried.allowance.fall_back() and chosen._tried is self._tried:
            self._reader.note_rollout_fault(words(why))

    def _in_time(self, ask: Callable[[Any], Any], request: Any, seconds: float) -> Any:
        """Raises what it raises, and TimeoutError after so many seconds; 0: whenever it answers."""
        if not seconds:
            return ask(request)
        if not self._places.acquire(blocking=False):
            raise TimeoutError(f"{MOST_LATE} requests compute in the candidate already")
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                answer.put((context.run(ask, request), None))
            except BaseException as error:
                answer.put((None, error))
            finally:
                self._places.release()

        # Not one that is joined at the end of the process: it may hang.
        threading.Thread(target=work, name="shipreader-candidate", daemon=True).start()
        try:
            value, error = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return value

    def _count(self, what: str) -> None:
        with self._counting:
            self._counts[what] += 1

    # ---- on the side

    def _ask_on_the_side(self, tried: _Tried, slot: int, request: Any, live: Any) -> None:
        try:
            self._waiting.put_nowait((tried, slot, request, live))
        except queue.Full:
            self._count("dropped")

    def _shadow(self) -> None:
        while True:
            tried, slot, request, live = self._waiting.get()
            if tried is not self._tried:
                self._count("dropped")
                continue
            value, failure = None, None
            began = time.perf_counter()
            try:
                value = tried.loaded(request)
            except (Exception, SystemExit) as error:
                failure = error
            seconds = time.perf_counter() - began
            self._count("shadow")
            if self._on_shadow is not None:
                try:
                    self._on_shadow(Shadow(request, live, value, failure, seconds, tried.candidate, slot))
                except (Exception, SystemExit):
                    _log.exception("on_shadow failed")
            # Nothing of it is kept while it waits for the next.
            del tried, request, live, value, failure
            time.sleep(rest_after(seconds, self._shadow_share))

    # ---- what the reader brings

    def _on_change(self, release: Release) -> None:
        tried = self._tried
        if tried is not None and _is_same(tried.candidate.release, release):
            loaded = tried.loaded
        else:
            loaded = self._load(release)
        self._live, self._tried = Loaded(release, loaded), None

    def _on_rollout(self, candidate: Candidate | None) -> None:
        before = self._tried
        if candidate is None or before is None or not _is_same(before.candidate.release, candidate.release):
            # No third one beside the two that are served.
            self._tried = before = None
        self._reader.note_rollout_fault("")
        if candidate is None:
            return
        loaded = before.loaded if before is not None else self._load(candidate.release)
        if candidate.shadow and self._shadowing is None:
            self._shadowing = threading.Thread(target=self._shadow, name="shipreader-shadow", daemon=True)
            self._shadowing.start()
        self._tried = _Tried(candidate, loaded, Allowance())


def _is_same(one: Release, other: Release) -> bool:
    return one.folder == other.folder and one.manifest.encoded == other.manifest.encoded

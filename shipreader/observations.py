"""What a server has answered, as rows in the bucket: kept in memory, written every few seconds, in no request's way.

observer = Observer("digits", bucket="models")
with Reader("digits", bucket="models", folder="/srv/digits", on_change=observer.use):
    ...
    observer.observe(request_id="r-17", key=user, latency_ms=3.1, inputs={"age": 31}, outputs={"score": 0.2})

observer.label("r-17", True)        # minutes or days later, from any process

What of inputs and outputs is kept is what the job of the live release names (`observe.columns`), and nothing else.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import random
import signal
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shipreader.bucket import s3_client
from shipreader.errors import ReaderError
from shipreader.kept import Kept, kept_by_job
from shipreader.observation_files import (
    FILE_BYTES,
    LIVE,
    LONGEST_ID,
    LONGEST_TEXT,
    LONGEST_VECTOR,
    ROWS,
    encode,
    has_pyarrow,
    observations_prefix,
)
from shipreader.observation_rows import LabelRow, ObservedRow, flattened, sampled
from shipreader.observation_sending import Put, put_once
from shipreader.records import Release

CLOSE_SECONDS = 8.0
"""What `close` takes at most to bring away what there is: who is ended by SIGTERM has ten, usually."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""After a write that failed; twice as long after each that follows."""
ROW_BYTES, VALUE_BYTES = 600, 100
"""What a row and a value of it take in memory, about."""
LARGEST_INTEGER = 2**63 - 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observed:
    """For a health check: rows since the start of the process."""

    written: int
    dropped: int
    """For want of room: the buffer was full, or the bucket away for too long."""
    left_out: int
    """Values that are too long to be kept, or of no type that is."""
    waiting_bytes: int
    """Compressed, not in the bucket yet."""
    problem: str
    """Why nothing can be written at the moment; empty when all is well."""


class Observer:
    """Writes what a server observed. Safe to use from many threads; only `close` and `flush` wait for the bucket.

    Rows stay in memory for at most `seconds` and are then one object, by one PUT of a thread of its own. When the
    bucket does not take it, it is tried again with pauses of up to a minute; what waits is bounded, and the oldest is
    dropped first. A process that is killed loses what was in memory.
    """

    def __init__(
        self,
        model: str,
        *,
        bucket: str = "",
        client: Any = None,
        columns: Mapping[str, Iterable[str]] | None = None,
        sample: float = 1.0,
        seconds: float = 10.0,
        rows: int = 5000,
        buffer_bytes: int = 32 * 2**20,
        waiting_bytes: int = 32 * 2**20,
        parquet: bool | None = None,
        put: Put | None = None,
    ) -> None:
        """Nothing is asked of the bucket here, and the thread starts with the first row.

        Args:
            model: whose requests they are.
            bucket: the bucket's name.
            client: a boto3 S3 client; None makes one from the environment, with short deadlines.
            columns: `inputs` and `outputs`, each with the names that are kept, as the job has them; `use` takes them
                from the release. None: no values are kept.
            sample: share of requests that are kept, above 0 and at most 1.
            seconds: at most so long a row stays in memory.
            rows: so many are written at once.
            buffer_bytes: what rows may take in memory before they are written, about; further ones are dropped.
            waiting_bytes: what compressed files may take while the bucket is away.
            parquet: as Parquet instead of lines of JSON; None: where pyarrow is installed.
            put: called in place of the bucket.

        Raises:
            ReaderError: a name, a share or a number that cannot be.
        """
        self._prefix = observations_prefix(model)
        if not bucket and put is None:
            raise ReaderError("bucket: expected its name, got none")
        if not seconds > 0 or not 1 <= rows <= ROWS:
            raise ReaderError(f"expected seconds above 0 and 1 to {ROWS:,} rows, got {seconds} and {rows}")
        self.model = model
        self._kept = Kept.of(columns, sample)
        self._release: Release | None = None
        self._bucket, self._given_client, self._put_elsewhere = bucket, client, put
        self._conditional = True
        self._seconds, self._most_rows, self._most_bytes = seconds, rows, buffer_bytes
        self._waiting_limit = waiting_bytes
        self._parquet = has_pyarrow() if parquet is None else parquet
        self._written = self._dropped = self._left_out = 0
        self._problem, self._dropping = "", False
        self._closed = False
        self._start_anew()
        _all.add(self)
        atexit.register(self._at_exit, weakref.ref(self))

    def _start_anew(self) -> None:
        """Also in a process that was forked: it has neither the thread nor a right to the rows."""
        self._writer = uuid.uuid4().hex[:8]
        self._rows: deque[ObservedRow | LabelRow] = deque()
        self._bytes = 0
        self._counting = threading.Lock()
        # Its put may be called by a handler of a signal, whatever this thread was at.
        self._wake: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._client: Any = self._given_client
        self._waiting: deque[tuple[str, bytes, int]] = deque()
        self._waiting_bytes = 0
        self._pause, self._not_before = 0.0, 0.0

    # ---- what is observed

    def use(self, release: Release) -> None:
        """From now on this is what is live: its job says what is kept. For `on_change` of a Reader."""
        self._release, self._kept = release, kept_by_job(release) or Kept(sample=self._kept.sample)

    def keep(self, kept: Kept) -> None:
        """From now on this is kept, whatever is live."""
        self._kept = kept

    def observe(
        self,
        *,
        request_id: str = "",
        key: object = None,
        latency_ms: float | None = None,
        error: BaseException | str = "",
        inputs: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
        release: str = "",
        generation: int = 0,
        rollout: str = "",
        arm: str = LIVE,
        fell_back: bool = False,
    ) -> str:
        """One request. Never raises and never waits: what there is no room for is dropped and counted.

        Args:
            request_id: by which a label will find it; a random one when empty.
            key: who asked, as releases are split by; only its slot is kept.
            latency_ms: from the request to the answer.
            error: what was raised instead of an answer; its class's name is kept.
            inputs: values by column: numbers, texts (cut at 512 characters), and vectors of at most 64 numbers, also as
                arrays. What the job does not name is not looked at; what is longer is kept as null and counted.
            outputs: the same of the answer.
            release: that answered; what `use` was given when empty.
            generation: the channel's, as `release`.
            rollout: id of the rollout, where one runs.
            arm: live, candidate or shadow.
            fell_back: whether the candidate was to answer, and the live release did.

        Returns:
            The request's id; empty when it is not kept.
        """
        try:
            kept, live = self._kept, self._release
            request_id = str(request_id)[:LONGEST_ID]
            if kept.sample < 1 and not sampled(request_id, kept.sample):
                return ""
            row = ObservedRow(
                at=time.time(),
                request_id=request_id or uuid.uuid4().hex,
                key=key if isinstance(key, str | int) else None,
                latency_ms=None if latency_ms is None else float(latency_ms),
                error=(error if isinstance(error, str) else type(error).__name__)[:LONGEST_ID],
                release=release or (live.id if live is not None else ""),
                generation=generation or (live.generation if live is not None else 0),
                rollout=rollout,
                arm=arm,
                fell_back=bool(fell_back),
            )
            size = ROW_BYTES
            for side, names, given in (("inputs", kept.inputs, inputs), ("outputs", kept.outputs, outputs)):
                found: dict[str, Any] = {}
                for name in names if given else ():
                    if given is not None and name in given:
                        found[name] = value = self._value(given[name])
                        size += VALUE_BYTES * (1 + (len(value) if isinstance(value, list) else 0))
                        size += len(value) if isinstance(value, str) else 0
                setattr(row, side, found)
            return row.request_id if self._take(row, size) else ""
        except Exception as error:
            # A request does not fail for what is said about it.
            self._drop(1, f"{type(error).__name__}: {error}")
            return ""

    def request(self, **said: Any) -> Observation:
        """One request, for as long as a block runs: its latency and what it raises are taken by themselves.

        said: as `observe` takes it, without `latency_ms`, `error` and `outputs`.
        """
        return Observation(self, said)

    def label(self, request_id: str, value: bool | int | float | str, *, name: str = "label") -> None:
        """What has turned out to be true of a request, also long after it and from another process.

        Args:
            request_id: as `observe` gave it back.
            value: a number or a text.
            name: where there are several of one request.

        Raises:
            ReaderError: no id, or neither a number nor a text.
        """
        if not isinstance(request_id, str) or not 0 < len(request_id) <= LONGEST_ID:
            raise ReaderError(f"request_id: expected a text of 1 to {LONGEST_ID} characters, got {request_id!r:.200}")
        found = self._value(value)
        if found is None or isinstance(found, list):
            raise ReaderError(f"label of {request_id}: expected a finite number or a text, got {value!r:.200}")
        self._take(LabelRow(time.time(), request_id, str(name)[:LONGEST_ID], found), ROW_BYTES)

    def status(self) -> Observed:
        """What was written, and what is wrong."""
        return Observed(self._written, self._dropped, self._left_out, self._waiting_bytes, self._problem)

    # ---- its end

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Write what there is, trying for at most so long. Returns whether all of it is in the bucket."""
        return self._thread is None or self._ask(_Asked(time.monotonic() + seconds))

    def _ask(self, asked: _Asked) -> bool:
        self._wake.put(asked)
        # A call of the client may outlast the deadline.
        return asked.done.wait(max(0.0, asked.until - time.monotonic()) + 2) and not self._waiting

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what there is, as `flush`, and end the thread; what is observed after this is dropped."""
        self._closed = True
        if self._thread is not None and not self._ask(_Asked(time.monotonic() + seconds, last=True)):
            lost = len(self._rows) + sum(count for _, _, count in list(self._waiting))
            _log.error("%s: %d observations are lost at the end: %s", self.model, lost, self._problem)
        self._thread = None

    def close_on_sigterm(self) -> None:
        """Have SIGTERM write what there is, before the process ends as it would have. To be called in the main thread.

        A handler that is set already is called as before; what it leaves is written at the end of the interpreter. A
        server that handles SIGTERM itself has a place for `close`: uvicorn, which ends the process by the signal in the
        end, FastAPI's lifespan; KServe `stop`; Triton `finalize`.
        """
        before = signal.getsignal(signal.SIGTERM)

        def ended(number: int, frame: Any) -> None:
            if callable(before):
                if self._thread is not None:
                    self._wake.put(_Asked(time.monotonic() + CLOSE_SECONDS))
                before(number, frame)
            elif before != signal.SIG_IGN:
                self.close()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, ended)

    @staticmethod
    def _at_exit(found: weakref.ref[Observer]) -> None:
        observer = found()
        if observer is not None and not observer._closed:
            observer.close()

    # ---- rows in memory

    def _value(self, value: Any) -> Any:
        """As it is kept: None, a number, a text, or a list of numbers."""
        kind = type(value)
        if kind is float:
            return value if math.isfinite(value) else None
        if kind is bool or value is None:
            return value
        if kind is int:
            return value if -LARGEST_INTEGER <= value <= LARGEST_INTEGER else self._none()
        if kind is str:
            return value[:LONGEST_TEXT]
        if hasattr(value, "tolist"):
            # Of numpy or torch, without importing either.
            count = value.numel() if hasattr(value, "numel") else value.size
            if count > LONGEST_VECTOR:
                return self._none()
            if count == 1:
                # Also of shape [1, 1]: one number is a number.
                return self._value(value.item())
            value = value.tolist()
        if isinstance(value, list | tuple):
            # What almost all are, in a third of the time.
            if len(value) <= LONGEST_VECTOR and {*map(type, value)} == {float} and all(map(math.isfinite, value)):
                return list(value)
            flat = flattened(value)
            if flat is None:
                return self._none()
            return [self._value(number) for number in flat]
        return self._none()

    def _none(self) -> None:
        self._left_out += 1

    def _take(self, row: ObservedRow | LabelRow, size: int) -> bool:
        with self._counting:
            full = self._closed or self._bytes + size > self._most_bytes
            if not full:
                self._bytes += size
        if full:
            self._drop(1, "it is closed" if self._closed else "the buffer is full")
            return False
        row.size = size
        self._rows.append(row)
        if self._thread is None:
            self._start()
        # Once for each batch, and not for each row beyond it.
        if len(self._rows) % self._most_rows == 0:
            self._wake.put(None)
        return True

    def _drop(self, count: int, why: str) -> None:
        self._dropped += count
        if not self._dropping:
            self._dropping = True
            _log.warning("%s: observations are dropped: %s", self.model, why)

    def _start(self) -> None:
        with self._counting:
            if self._thread is None:
                name = f"shipreader-observations-{self.model}"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()

    # ---- in the thread

    def _work(self) -> None:
        due = time.monotonic() + self._seconds
        while True:
            asked = self._asked(due)
            if asked or time.monotonic() >= due or len(self._rows) >= self._most_rows:
                due = time.monotonic() + self._seconds
                try:
                    self._pack()
                except Exception as error:
                    # Whatever it is, a thread that ended would leave all rows behind without a word.
                    self._drop(1, f"{type(error).__name__}: {error}")
            self._send(max((one.until for one in asked), default=None))
            for one in asked:
                one.done.set()
            if any(one.last for one in asked):
                return

    def _asked(self, due: float) -> list[_Asked]:
        """Wait until it is time for something; who asked for everything to be written."""
        if self._waiting:
            due = min(due, self._not_before)
        found: list[_Asked | None] = []
        try:
            found.append(self._wake.get(timeout=max(0.0, due - time.monotonic())))
            while True:
                found.append(self._wake.get_nowait())
        except queue.Empty:
            return [one for one in found if one is not None]

    def _pack(self) -> None:
        """Make files of the rows, and drop the oldest files while they are too many."""
        while self._rows:
            taken: list[ObservedRow | LabelRow] = []
            while self._rows and len(taken) < self._most_rows:
                taken.append(self._rows.popleft())
            size = sum(row.size for row in taken)
            # A handler of SIGTERM may hold up whoever has it, and waits for this thread.
            if self._counting.acquire(timeout=0.5):
                self._bytes -= size
                self._counting.release()
            for labels in (False, True):
                rows = [row.document(self.model) for row in taken if isinstance(row, LabelRow) == labels]
                if rows:
                    self._add(rows, labels=labels)

    def _add(self, rows: list[dict[str, Any]], *, labels: bool) -> None:
        try:
            name, body = encode(rows, self._writer, labels=labels, parquet=self._parquet)
        except Exception as error:
            self._drop(len(rows), f"they cannot be written: {type(error).__name__}: {error}")
            return
        if len(body) > FILE_BYTES and len(rows) > 1:
            half = len(rows) // 2
            self._add(rows[:half], labels=labels)
            self._add(rows[half:], labels=labels)
            return
        self._waiting.append((name, body, len(rows)))
        self._waiting_bytes += len(body)
        while self._waiting_bytes > self._waiting_limit:
            _, oldest, count = self._waiting.popleft()
            self._waiting_bytes -= len(oldest)
            self._drop(count, f"too many wait for the bucket: {self._problem}")

    def _send(self, until: float | None) -> None:
        """Bring away what waits.

        until: tried again at once before this time; None: after the pause that follows a failure.
        """
        while self._waiting and (until is not None or time.monotonic() >= self._not_before):
            name, body, count = self._waiting[0]
            try:
                (self._put_elsewhere or self._put)(name, body)
            except Exception as error:
                self._failed(" ".join(str(error).split())[:500] or repr(error))
                if until is not None:
                    if time.monotonic() + 0.5 > until:
                        return
                    time.sleep(0.5)
                continue
            self._waiting.popleft()
            self._waiting_bytes -= len(body)
            self._written += count
            if self._problem:
                _log.warning("%s: observations are written again", self.model)
            self._problem, self._dropping, self._pause = "", False, 0.0

    def _failed(self, problem: str) -> None:
        if not self._problem:
            _log.error("%s: observations cannot be written, and wait in memory: %s", self.model, problem)
        self._problem = problem
        self._pause = min(LONGEST_PAUSE_SECONDS, 2 * self._pause or FIRST_PAUSE_SECONDS)
        # Servers that lost their bucket together do not all come back at once.
        self._not_before = time.monotonic() + self._pause * random.uniform(0.5, 1)

    def _put(self, name: str, body: bytes) -> None:
        if self._client is None:
            self._client = s3_client(read_seconds=5, attempts=1)
        self._conditional = put_once(self._client, self._bucket, self._prefix + name, body, self._conditional)


class Observation:
    """One request. Whoever answers it says so by `outputs`."""

    def __init__(self, observer: Observer, said: Mapping[str, Any]) -> None:
        self._observer, self._said = observer, said
        self.id = str(said.get("request_id") or uuid.uuid4().hex)
        """By which a label will find it."""
        self.outputs: Mapping[str, Any] | None = None

    def __enter__(self) -> Observation:
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        took = 1000 * (time.perf_counter() - self._began)
        said = {**self._said, "request_id": self.id, "error": error if error is not None else ""}
        self._observer.observe(latency_ms=took, outputs=self.outputs, **said)


@dataclass
class _Asked:
    """Somebody who waits until all is written, or until this time on the monotonic clock."""

    until: float
    last: bool = False
    """Whether the thread ends with it."""
    done: threading.Event = field(default_factory=threading.Event)


_all: weakref.WeakSet[Observer] = weakref.WeakSet()


def _after_fork() -> None:
    for observer in list(_all):
        observer._start_anew()


os.register_at_fork(after_in_child=_after_fork)

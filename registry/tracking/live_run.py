"""A run in MLflow that can be watched while it trains.

The file of events that a worker writes anyway is the buffer: a thread reads it and sends what is new every few
seconds. Training never waits for MLflow, and an MLflow that is slow or gone for hours costs no memory; when it
is back, the thread goes on where it stopped. Whatever is then still missing is added when the run is registered.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from train_and_ship.infra.errors import ShipError
from train_and_ship.registry.tracking import runs as mlflow_runs
from train_and_ship.registry.tracking.connection import key
from train_and_ship.registry.tracking.curves import EventPoints, Point
from train_and_ship.registry.tracking.runs import BATCH_OF_METRICS, OpenRun, RunRecord, missing_points

SEND_SECONDS = 3.0
"""Least time between two batches."""
SEND_SHARE = 0.01
"""Part of the time that sending may take: on a slow server the batches become fewer and larger."""
LONGEST_PAUSE_SECONDS = 15.0
FAILED_PAUSES = 5
"""How much longer the pause is after MLflow did not answer."""
SYSTEM_SAMPLES = 100_000
"""Values of the machine kept while MLflow is away: 17 hours of eight every 5 s."""
LAST_SAMPLE_SECONDS = 0.5
"""How long the last batch waits for the last measure of the machine."""
STOP_SECONDS = 3.0
"""How long the end of a run may wait for the last batch."""


class LiveRun:
    """One run, opened and fed by a thread of its own from `start` to `stop`. Nothing here raises but `end`."""

    def __init__(
        self, record: RunRecord, tracking_uri: str, warn: Callable[[str], None], *, send_seconds: float = SEND_SECONDS
    ) -> None:
        """Nothing is sent before `start`.

        Args:
            record: what MLflow is told when the run is opened.
            tracking_uri: MLflow's.
            warn: told once, in words, when MLflow cannot be reached.
            send_seconds: between two times that something is sent.
        """
        self._record, self._uri, self._warn, self._send_seconds = record, tracking_uri, warn, send_seconds
        self._run: OpenRun | None = None
        self._latest: dict[str, int] = {}
        self._files: deque[EventPoints] = deque()
        self._samples: deque[Point] = deque(maxlen=SYSTEM_SAMPLES)
        self._pending: list[Point] = []
        self._system_step = 0
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._opening = threading.Lock()
        """Held while the run is looked for and made: two at once would make two."""
        self._abandoned = False
        self._complete = False
        self._warned = False
        self._sender = threading.Thread(target=self._send_until_stopped, name="mlflow-live", daemon=True)
        self._sampler = threading.Thread(target=self._sample_until_stopped, name="mlflow-system", daemon=True)

    def start(self) -> None:
        """Begin to import mlflow and to open the run, in the background."""
        _live[self._record.tags[mlflow_runs.TAG_FLOW_RUN]] = self
        self._sender.start()

    def tail(self, events: Path) -> None:
        """Show this file from now on, after the rest of those before. events: made when it is not there yet."""
        events.touch()
        self._files.append(EventPoints(events))

    def send_soon(self) -> None:
        """A good moment to send: the machine has nothing better to do."""
        self._wake.set()

    def stop(self, seconds: float = STOP_SECONDS) -> bool:
        """Send what is left and end the threads. Returns whether MLflow now has every point; the run stays open."""
        self._stopping.set()
        self._wake.set()
        if self._sender.ident is not None:
            self._sender.join(seconds)
        # A thread that still waits for MLflow must not wake up later and send beside its successor.
        self._abandoned = True
        return self._complete

    def end(self, status: str, reason: str, report: Path | None = None) -> None:
        """The flow run failed or was cancelled. status: `FAILED` or `KILLED`; report: HTML file about it.

        Raises ServiceError, SettingsError.
        """
        self.stop()
        flow_run_id = self._record.tags[mlflow_runs.TAG_FLOW_RUN]
        with self._opening:
            if self._run is None:
                # It failed sooner than mlflow is imported: worth a run all the same.
                mlflow_runs.open_run(self._record, self._uri)
        mlflow_runs.end_run(self._record.model, flow_run_id, status, reason, self._uri, report)
        _live.pop(flow_run_id, None)

    # ---- the sending thread

    def _send_until_stopped(self) -> None:
        while not self._abandoned:
            last = self._stopping.is_set()
            self._wake.clear()
            pause = FAILED_PAUSES * self._send_seconds
            try:
                self._open()
                if self._abandoned:
                    break
                if last and self._sampler.ident is not None:
                    # It measures once more when it is told to stop: a short run has a measure too.
                    self._sampler.join(LAST_SAMPLE_SECONDS)
                pause = max(self._send_seconds, self._send() / SEND_SHARE)
                self._complete = last and not self._abandoned
            except ShipError as error:
                self._warn_once(str(error))
            except Exception as error:
                # Watching must not disturb what is watched.
                self._warn_once(f"{type(error).__name__}: {error}")
            if last:
                break
            if not self._stopping.is_set():
                self._wake.wait(min(pause, LONGEST_PAUSE_SECONDS))

    def _open(self) -> None:
        with self._opening:
            if self._run is not None or self._abandoned:
                return
            run = mlflow_runs.open_run(self._record, self._uri)
            self._latest = dict(run.latest)
            self._run = run
        if not run.finished:
            self._system_step = 1 + max((s for name, s in run.latest.items() if name.startswith("system/")), default=-1)
            # Only now: the import, which is no part of anybody's work, is behind us.
            self._sampler.start()
        mlflow_runs.end_abandoned(run.experiment_id, self._uri)

    def _send(self) -> float:
        """Everything there is to send; returns the seconds it took."""
        assert self._run is not None
        began = time.monotonic()
        while batch := self._next_batch():
            mlflow_runs.log_points(self._run.run_id, batch, self._uri)
            if self._abandoned:
                break
            self._pending = self._pending[len(batch) :]
        return time.monotonic() - began

    def _next_batch(self) -> list[Point]:
        while len(self._pending) < BATCH_OF_METRICS:
            points = self._read()
            if not points:
                break
            # Another attempt repeats some steps: the curve keeps what it has.
            fresh = missing_points(points, self._latest)
            for point in fresh:
                self._latest[key(point.key)] = point.step
            self._pending += fresh
        return self._pending[:BATCH_OF_METRICS]

    def _read(self) -> list[Point]:
        """New points of the machine and of the oldest file that has any."""
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        while self._files:
            if points := self._files[0].read():
                return samples + points
            if len(self._files) == 1:
                break
            # Another attempt has begun: the one before will write no more.
            self._files.popleft().close()
        return samples

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"MLflow cannot be told how it goes; the run goes on and its curves are added later. {reason}")

    # ---- the measuring thread

    def _sample_until_stopped(self) -> None:
        with contextlib.suppress(Exception):
            sample, seconds = mlflow_runs.system_monitor()
            stopped = False
            while not stopped:
                stopped = self._stopping.wait(seconds)
                now = time.time()
                self._samples.extend(Point(name, value, self._system_step, now) for name, value in sample().items())
                self._system_step += 1


_live: dict[str, LiveRun] = {}


def live_run(flow_run_id: str) -> LiveRun | None:
    """The one that this process started for a flow run."""
    return _live.get(flow_run_id)


@atexit.register
def _end_all() -> None:
    """Whoever leaves without a word (an exit, a cancelled run) leaves no run that looks alive."""
    for live in list(_live.values()):
        if not live._stopping.is_set():
            with contextlib.suppress(Exception):
                live.end("KILLED", "stopped before its end: cancelled, or its process was told to exit")

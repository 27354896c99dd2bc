"""One release in ONNX Runtime, with requests computed together where samples do not see one another.

It imports numpy and onnxruntime: `ship serve` runs it in an environment of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from shipreader.inference_tensors import Arrays, RequestError, Signature

CALLS_A_SECOND = 50
"""At which it is measured what idle threads cost."""
MEASURED_CALLS = 25
MEASURED_SECONDS = 1.0
"""Each way, but for the call in which it ends."""
MEASURED_BYTES = 64 * 2**20
"""Of one row, at most: what a release says of its sizes is no reason to fill the memory before anybody asked."""
WORTH_SPINNING = 0.75
"""Threads spin where that makes a call at least a quarter faster."""


@dataclass(frozen=True)
class ModelDocument:
    """What `ship serve` says of a release."""

    model: str
    generation: int
    """The version in answers: of the channel, so that a rollback has a higher one."""
    artifact: str
    """Absolute path of the ONNX file."""
    signature: Mapping[str, Any]
    """The manifest's."""
    batch_size: int
    """At most so many rows are computed together; 1 for each request alone."""
    version: str = ""
    """In answers; empty for the generation."""
    release: str = ""
    """Its id."""
    observe: Mapping[str, Any] | None = None
    """What of requests is kept while it is live: the fields of shipreader/kept.py; None: they are not observed."""


@dataclass(frozen=True, eq=False)
class _Call:
    inputs: Arrays
    rows: int
    answer: asyncio.Future[list[np.ndarray[Any, Any]]]


class Model:
    """A loaded release. Made in a thread, used in the event loop."""

    def __init__(self, document: ModelDocument, *, spin: bool) -> None:
        """Raises onnxruntime's errors for a file that it cannot load."""
        self.name, self.version = document.model, document.version or str(document.generation)
        self.generation, self.release = document.generation, document.release
        self.signature = Signature.of(document.signature)
        self._batch_size = document.batch_size
        self._session = session(document.artifact, spin=spin)
        self._names = list(self.signature.outputs)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnx")
        self._waiting: deque[_Call] = deque()
        self._working: asyncio.Task[None] | None = None
        self._began: float | None = None

    def seconds_at_work(self) -> float:
        """For how long it has computed what it computes now; 0 when it is idle."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def infer(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """The outputs of these names. What waits while the model computes is computed together next.

        Raises RequestError with the runtime's words for values that the model does not take.
        """
        rows = len(next(iter(inputs.values()))) if self._batch_size > 1 else 1
        loop = asyncio.get_running_loop()
        call = _Call(inputs, rows, loop.create_future())
        self._waiting.append(call)
        if self._working is None:
            self._working = loop.create_task(self._work())
        try:
            answer = await call.answer
        except asyncio.CancelledError:
            # Whoever asked is gone; what they sent goes too, or would pile up while the model computes.
            with contextlib.suppress(ValueError):
                self._waiting.remove(call)
            raise
        found = dict(zip(self._names, answer, strict=True))
        return [found[name] for name in outputs]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            calls = self._next()
            self._began = time.monotonic()
            found = await loop.run_in_executor(self._thread, self._answers, calls)
            self._began = None
            for call, answer in zip(calls, found, strict=True):
                if call.answer.done():
                    # Nobody waits for it any more.
                    continue
                if isinstance(answer, Exception):
                    call.answer.set_exception(answer)
                else:
                    call.answer.set_result(answer)
        self._working = None

    def _next(self) -> list[_Call]:
        calls = [self._waiting.popleft()]
        rows = calls[0].rows
        while self._waiting and rows + self._waiting[0].rows <= self._batch_size:
            calls.append(self._waiting.popleft())
            rows += calls[-1].rows
        return calls

    def _answers(self, calls: Sequence[_Call]) -> list[list[np.ndarray[Any, Any]] | Exception]:
        """In the model's own thread."""
        try:
            if len(calls) == 1:
                return [self._session.run(self._names, calls[0].inputs)]
            return self._together(calls)
        except Exception as error:
            if len(calls) == 1:
                return [_refusal(error)]
            # One request that the model does not take fails all of them: each by itself tells which.
            return [answer for call in calls for answer in self._answers([call])]

    def _together(self, calls: Sequence[_Call]) -> list[list[np.ndarray[Any, Any]] | Exception]:
        joined = {name: np.concatenate([call.inputs[name] for call in calls]) for name in self.signature.inputs}
        found = self._session.run(self._names, joined)
        ends = np.cumsum([call.rows for call in calls])
        if any(array.shape[:1] != (ends[-1],) for array in found):
            raise ValueError(f"expected {ends[-1]} rows of each output, got {[array.shape for array in found]}")
        return [[array[end - call.rows : end] for array in found] for call, end in zip(calls, ends, strict=True)]


def session(path: str, *, spin: bool) -> Any:
    """An ONNX Runtime session on the cores that this process may use; `spin`: idle threads wait by running."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    # Whatever it is called, it is what the promotion has tried.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Refused inputs are answered, not logged.
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _refusal(error: Exception) -> RequestError:
    """What the runtime says, without the words around it: the model's own limit, as of an index out of range."""
    text = str(error)
    for mark in ("Status Message: ", "[ONNXRuntimeError] : "):
        text = text.rpartition(mark)[2]
    lacking = isinstance(error, MemoryError) or "allocat" in text.lower()
    return RequestError(
        f"the model does not take this input: {text.strip()}" if not lacking else text, 500 if lacking else 400
    )


# ---- whether idle threads spin


@dataclass(frozen=True)
class Spinning:
    """What was measured, and what came of it."""

    spin: bool
    words: str
    """For people."""


def choose_spinning(document: ModelDocument) -> Spinning:
    """Ask the model at 50 calls a second both ways, one row of zeros each; the cheaper way unless it is slow.

    Threads that sleep when idle cost a call the time to wake them; threads that spin cost the machine's other work. One
    way after the other: threads spin on for some 40 ms of CPU time after a call, which would count among the sleepers'.
    Never raises for what the release is like: where it cannot be measured they sleep.
    """
    count = len(os.sched_getaffinity(0))
    if count == 1:
        return Spinning(False, "1 thread")
    found = {}
    try:
        shapes = _least_shapes(signature := Signature.of(document.signature))
        size = sum(math.prod(shape) * signature.inputs[name].dtype.itemsize for name, shape in shapes.items())
        if size > MEASURED_BYTES:
            why = f"one row takes {size:,} bytes, and at most {MEASURED_BYTES:,} are made up for it"
            return Spinning(False, f"{count} threads, which sleep when idle (not measured: {why})")
        zeros = {name: np.zeros(shape, signature.inputs[name].dtype) for name, shape in shapes.items()}
        for spin in (False, True):
            found[spin] = _cost(partial(session(document.artifact, spin=spin).run, None, zeros))
    except Exception:
        # Zeros are not what every model takes.
        return Spinning(False, f"{count} threads, which sleep when idle (not measured: the model takes no zeros)")
    (slow, less), (fast, more) = found[False], found[True]
    spin = fast < slow * WORTH_SPINNING
    return Spinning(
        spin,
        f"{count} threads, which {'spin' if spin else 'sleep'} when idle: asleep a call takes {1000 * slow:.2f} ms and "
        f"{CALLS_A_SECOND} a second {less:.2f} CPU seconds, spinning {1000 * fast:.2f} ms and {more:.2f}",
    )


def _cost(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call in the middle, and CPU seconds a second at so many calls a second."""
    call()
    times: list[float] = []
    began, used = time.monotonic(), time.process_time()
    while len(times) < MEASURED_CALLS and time.monotonic() < began + MEASURED_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        time.sleep(max(1 / CALLS_A_SECOND - times[-1], 0))
    return statistics.median(times), (time.process_time() - used) / len(times) * CALLS_A_SECOND


def _least_shapes(signature: Signature) -> dict[str, list[int]]:
    """By input. One row; every other dynamic dimension at its smallest."""
    return {
        name: [
            size if isinstance(size, int) else max(signature.ranges.get(size, (1, None))[0], 1) for size in tensor.shape
        ]
        for name, tensor in signature.inputs.items()
    }

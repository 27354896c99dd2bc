"""The candidate of a rollout beside what is served: which requests it answers, and no request fails because of it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge, Summary

from shipreader.fallbacks import SHADOW_WAITING, Allowance, rest_after, words
from shipreader.inference_model import Model, ModelDocument
from shipreader.inference_observed import Observation, Observing
from shipreader.inference_tensors import Request, RequestError
from shipreader.split import slot_of

# While a rollout runs; `version` is the one in answers.
_ARM = ["model", "version", "arm"]
_SECONDS = Summary("model_rollout_request_duration", "Seconds that an arm of a rollout took to compute", _ARM)
_ERRORS = Counter("model_rollout_request_error", "Requests of an arm that raised, or were late", _ARM)
_FALLBACKS = Counter("model_rollout_fallback", "Of the candidate, answered by the live release", ["model", "version"])
_DROPPED = Counter("model_rollout_shadow_dropped", "Not asked on the side: no time, or no room", ["model", "version"])
_SHARE = Gauge("model_rollout_share", "Of all keys, that the candidate is for", ["model", "version"])

Answer = TypeVar("Answer")
Render = Callable[[Model, Request, list[Any]], Answer]
"""Makes of the arrays what goes back to who asked."""


@dataclass(frozen=True)
class CanaryDocument:
    """What `ship serve` says of a candidate; the fields are those of shipreader/rollouts.py."""

    model: ModelDocument
    share: int
    key: str
    fallback_ms: int
    shadow: bool
    rollout: str
    number: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> CanaryDocument:
        """From JSON."""
        return cls(**{**said, "model": ModelDocument(**said["model"])})


SHORT_BYTES = 2**16
"""An answer of arrays of more is written in a thread: whoever asks for health does not wait for it."""
_WRITERS = ThreadPoolExecutor(2, thread_name_prefix="answers")


async def computed(
    model: Model, asked: Request, render: Render[Answer], visit: Callable[[], Any], seen: Observation
) -> Answer:
    """What a model answers.

    Args:
        model: to ask.
        asked: what is asked of it.
        render: makes the answer of the arrays; of large ones in a thread.
        visit: a part of the server's room, for arrays that wait to be written.
        seen: told what the model made.

    Raises:
        RequestError: the model does not take it, or made more than its release declares; there is no room.
    """
    outputs = seen.outputs = await model.infer(asked.inputs, asked.outputs)
    model.signature.require_declared(asked.outputs, outputs, asked.sizes)
    size = sum(array.nbytes for array in outputs)
    if size <= SHORT_BYTES:
        return render(model, asked, outputs)
    held = visit()
    held.hold(size)
    work = _WRITERS.submit(render, model, asked, outputs)
    # Also of who hung up: the thread goes on.
    work.add_done_callback(lambda _: held.end())
    return await asyncio.wrap_future(work)


class Canary:
    """A loaded candidate beside the model that it is tried against. Used in the event loop."""

    def __init__(
        self,
        live: Model,
        model: Model,
        document: CanaryDocument,
        visit: Callable[[], Any],
        hang_seconds: float,
        observing: Observing,
    ) -> None:
        """What is tried, and beside what.

        Args:
            live: what answers all other requests, and those that the candidate does not answer.
            model: the candidate.
            document: who gets it.
            visit: a part of the server's room, for what waits to be asked on the side.
            hang_seconds: a candidate that computes for longer hangs.
            observing: writes down what each arm answered.
        """
        self.live, self.model, self.document = live, model, document
        self._observing = observing
        self._visit, self._seconds = visit, document.fallback_ms / 1000 or hang_seconds
        self._allowance = Allowance()
        self.words = ""
        """Why it gets no requests any more."""
        self._waiting: deque[tuple[Request, str, Any]] = deque()
        self._working: asyncio.Task[None] | None = None
        _SHARE.labels(model.name, model.version).set(document.share / 10_000)
        # Looked up once, not in every request.
        arms = {"live": live, "candidate": model, "shadow": model}
        self._measures = {
            arm: (_SECONDS.labels(of.name, of.version, arm), _ERRORS.labels(of.name, of.version, arm))
            for arm, of in arms.items()
        }

    async def answer(self, asked: Request, render: Render[Answer]) -> tuple[Model, Answer]:
        """Who answered, and what. Raises what the live release raises."""
        self._allowance.request()
        key = asked.parameters.get(self.document.key)
        slot = slot_of(self.live.name, key)
        # Of both answers, where there are two.
        request_id = asked.id or uuid.uuid4().hex
        if slot is None or slot >= self.document.share or self._allowance.spent:
            with self._observed(self.live, "live", asked, request_id) as seen:
                return self.live, await self._timed(self.live, "live", asked, render, seen)
        if self.document.shadow:
            with self._observed(self.live, "live", asked, request_id) as seen:
                answer = await self._timed(self.live, "live", asked, render, seen)
            self._ask_on_the_side(asked, request_id)
            return self.live, answer
        try:
            with self._observed(self.model, "candidate", asked, request_id) as seen:
                if self.model.seconds_at_work() > self._seconds:
                    raise TimeoutError
                async with asyncio.timeout(self._seconds):
                    fitting = self._for_candidate(asked)
                    return self.model, await self._timed(self.model, "candidate", fitting, render, seen)
        except Exception as error:
            why = f"{error}"[:200]
            if isinstance(error, TimeoutError):
                why = f"more than {1000 * self._seconds:g} ms"
                self._measures["candidate"][1].inc()
        # Its row is the candidate's, which fell back.
        answer = await self._timed(self.live, "live", asked, render, Observation(None, self.live, asked, {}))
        # The live release answers it, so it was not the request.
        _FALLBACKS.labels(self.model.name, self.model.version).inc()
        if self._allowance.fall_back():
            self.words = words(why)
            logging.error("the live release answers all: %s", self.words)
        return self.live, answer

    def _for_candidate(self, asked: Request) -> Request:
        """Raises RequestError for sizes beyond those that its release declares."""
        signature = self.model.signature
        signature.require_sizes({name: array.shape for name, array in asked.inputs.items()})
        if not asked.said:
            return asked
        return replace(asked, said={name: signature.parameters_of(name) for name in asked.said})

    def _observed(self, model: Model, arm: str, asked: Request, request_id: str) -> Observation:
        said = {"arm": arm, "request_id": request_id, "rollout": self.document.rollout}
        return self._observing.request(model, asked, key=asked.parameters.get(self.document.key), **said)

    async def _timed(self, model: Model, arm: str, asked: Request, render: Render[Answer], seen: Observation) -> Answer:
        seconds, errors = self._measures[arm]
        began = time.perf_counter()
        try:
            answer = await computed(model, asked, render, self._visit, seen)
        except Exception:
            errors.inc()
            raise
        seconds.observe(time.perf_counter() - began)
        return answer

    # ---- on the side

    def _ask_on_the_side(self, asked: Request, request_id: str) -> None:
        visit = self._visit()
        try:
            if len(self._waiting) >= SHADOW_WAITING:
                raise RequestError("as many wait as may", 429)
            visit.hold(sum(array.nbytes for array in asked.inputs.values()))
        except RequestError:
            _DROPPED.labels(self.model.name, self.model.version).inc()
            return
        self._waiting.append((asked, request_id, visit))
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._shadow())

    async def _shadow(self) -> None:
        while self._waiting:
            asked, request_id, visit = self._waiting.popleft()
            began = time.perf_counter()
            try:
                with visit, self._observed(self.model, "shadow", asked, request_id) as seen:
                    async with asyncio.timeout(self._seconds):
                        await self._timed(self.model, "shadow", self._for_candidate(asked), lambda *_: None, seen)
            except Exception as error:
                logging.debug("on the side: %s", error)
            del asked
            await asyncio.sleep(rest_after(time.perf_counter() - began))
        self._working = None

    def close(self) -> None:
        """Ask it nothing more on the side."""
        while self._waiting:
            self._waiting.popleft()[-1].end()
        _SHARE.remove(self.model.name, self.model.version)

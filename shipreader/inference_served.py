"""What is served, to how many at once, and what is counted of it: the same for HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import Counter, Gauge, Summary

from shipreader.inference_canary import Answer, Canary, CanaryDocument, Render, computed
from shipreader.inference_limits import Limits
from shipreader.inference_model import Model, ModelDocument, Spinning, choose_spinning
from shipreader.inference_observed import Observing
from shipreader.inference_tensors import LONGEST_ID, Request, RequestError

# Names and labels that MLServer's users have on their dashboards.
_SUCCESS = Counter("model_infer_request_success", "Requests that got an answer", ["model", "version"])
_FAILURE = Counter("model_infer_request_failure", "Requests that got none", ["model", "version"])
_SECONDS = Summary("model_infer_request_duration", "Seconds from a request to its answer", ["model", "version"])
_AT_ONCE = Gauge("model_infer_requests_at_once", "Requests that are computed or wait")

_COUNTING = threading.Lock()
"""Large answers are written, and counted, in threads."""


class Served:
    """What is served. Replaced as a whole."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.model: Model | None = None
        self.observing = Observing(name)
        self.canary: Canary | None = None
        self.canary_words = ""
        """Why a candidate that was wanted is not tried."""
        self._wanted: CanaryDocument | None = None
        self._loading: asyncio.Task[None] | None = None
        self.fresh = True
        """Whether who follows the channel says that this is what is live."""
        self._spinning: Spinning | None = None
        self._metadata: WeakKeyDictionary[Model, bytes] = WeakKeyDictionary()
        self.requests = self.bytes = 0
        """Computed or waiting; of all that are here, as they came, and of answers until they are taken."""
        _AT_ONCE.set_function(lambda: self.requests)

    def load(self, document: ModelDocument) -> str:
        """In a thread: open it beside what is served, and then serve it; words about its threads.

        A candidate that is tried beside another one gets no requests any more.
        """
        if self._spinning is None:
            # Once: a release that follows does not wait for it.
            self._spinning = choose_spinning(document)
        self.model = Model(document, spin=self._spinning.spin)
        self.observing.use(document.observe)
        return self._spinning.words

    def follow(self, wanted: CanaryDocument | None) -> None:
        """In the event loop: try this candidate from now on, or none. One that is loaded already is not loaded again.

        Loading it holds up nothing else; `canary_words` says why it cannot be had.
        """
        now, self._wanted, self.canary_words = self.canary, wanted, ""
        self._end_canary()
        if wanted is None:
            return
        if now is not None and now.live is self.model and now.document.model == wanted.model:
            self._begin_canary(now.model, wanted)
        elif self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load_canary())

    async def _load_canary(self) -> None:
        while (wanted := self._wanted) is not None and self.canary is None and not self.canary_words:
            assert self._spinning is not None
            try:
                model = await asyncio.to_thread(Model, wanted.model, spin=self._spinning.spin)
                if (now := self._wanted) is not None and now.model == wanted.model:
                    self._begin_canary(model, now)
            except Exception as error:
                if self._wanted is wanted:
                    self.canary_words = f"the server cannot load the candidate: {type(error).__name__}: {error}"[:1000]
                    logging.error("%s", self.canary_words)
        self._loading = None

    def _begin_canary(self, model: Model, wanted: CanaryDocument) -> None:
        live = self.model
        if live is None or live.generation != wanted.model.generation:
            raise ValueError(f"expected one beside the generation that is served, got {wanted.model.generation}")
        self.canary = Canary(live, model, wanted, self.visit, self.limits.compute_seconds, self.observing)
        self._metadata.clear()
        logging.info("version %s is tried on %g %% of %s", model.version, wanted.share / 100, wanted.key)

    def _end_canary(self) -> None:
        canary, self.canary = self.canary, None
        if canary is not None:
            canary.close()
            self._metadata.clear()

    async def answer(
        self, model: Model, asked: Request, render: Render[Answer], *, version: str
    ) -> tuple[Model, Answer]:
        """Who answered, and what: the model, or the candidate that is tried beside it.

        Args:
            model: what `named` gave.
            asked: what is asked of it.
            render: makes the answer of the arrays that a model gives.
            version: that was asked for; with one it is that, or none.

        Raises:
            RequestError: the model does not take it, or made more than declared.
        """
        canary = self.canary
        if canary is None or version or model is not canary.live:
            with self.observing.request(model, asked) as seen:
                return model, await computed(model, asked, render, self.visit, seen)
        return await canary.answer(asked, render)

    @property
    def said_of_canary(self) -> str:
        """Why a candidate gets no requests here; empty where it does, or there is none."""
        return self.canary_words or (self.canary.words if self.canary is not None else "")

    @property
    def models(self) -> list[Model]:
        """What is served, and the candidate that is tried beside it."""
        return [model for model in (self.model, self.canary.model if self.canary else None) if model is not None]

    def named(self, name: str, version: str = "") -> Model:
        """Raises RequestError, 404, for another model or version than is served."""
        model = self.model
        if model is None:
            raise RequestError("no release is loaded yet", 503)
        if name != model.name:
            raise RequestError(f"expected the model {model.name}, got {name[:LONGEST_ID]}", 404)
        if (canary := self.canary) is not None and version == canary.model.version:
            return canary.model
        if version not in ("", model.version):
            raise RequestError(
                f"expected version {model.version} of {name}, the channel's generation; got {version[:LONGEST_ID]}",
                404,
            )
        return model

    def metadata_json(self, model: Model) -> bytes:
        """As HTTP has it: made once for each release, as labels may be long."""
        if (found := self._metadata.get(model)) is None:
            found = self._metadata[model] = json.dumps(self.metadata(model), ensure_ascii=False).encode()
        return found

    def metadata(self, model: Model) -> dict[str, Any]:
        """As the protocol has it."""
        return {
            "name": model.name,
            "versions": [one.version for one in (self.models if model in self.models else [model])],
            "platform": "onnxruntime_onnx",
            "inputs": [tensor.metadata() for tensor in model.signature.inputs.values()],
            "outputs": [
                {**tensor.metadata(), **({"parameters": said} if (said := model.signature.parameters_of(name)) else {})}
                for name, tensor in model.signature.outputs.items()
            ],
        }

    @property
    def ready(self) -> bool:
        """Whether requests may come: a release is loaded, it is known to be live, and it does not hang."""
        model = self.model
        return model is not None and self.fresh and model.seconds_at_work() < self.limits.compute_seconds

    # ---- how many at once

    def require_room(self) -> None:
        """Raises RequestError, 429, when as many requests are here as may be."""
        if self.requests >= self.limits.requests:
            raise RequestError(f"{self.limits.requests} requests are computed or wait already; try again", 429)

    def visit(self) -> Visit:
        """What one request takes of the room, while the block runs."""
        return Visit(self)


class Visit:
    """One request's part of the room, given back at the end of the block, or by `end`."""

    __slots__ = ("_bytes", "_ended", "_placed", "_served")

    def __init__(self, served: Served) -> None:
        self._served, self._bytes, self._placed, self._ended = served, 0, False, False

    def hold(self, size: int) -> None:
        """So many bytes more are here; in any thread.

        Raises RequestError, 429, when those of all requests are too many, or nobody waits for this one any more.
        """
        served = self._served
        with _COUNTING:
            if self._ended:
                raise RequestError("the client hung up", 429)
            if served.bytes + size > served.limits.bytes_at_once:
                raise RequestError(
                    f"requests and answers of {served.bytes:,} bytes are here already, and at most "
                    f"{served.limits.bytes_at_once:,} may be; try again",
                    429,
                )
            self._bytes += size
            served.bytes += size

    def enter(self) -> None:
        """Take a place among those that are computed or wait. Raises RequestError, 429, when there is none."""
        self._served.require_room()
        self._served.requests += 1
        self._placed = True

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Give it back, once."""
        with _COUNTING:
            self._served.bytes -= self._bytes
            self._served.requests -= self._placed
            self._bytes, self._placed, self._ended = 0, False, True


class Counted:
    """A request that is counted: to which model."""

    __slots__ = ("model",)

    def __init__(self, model: Model) -> None:
        self.model = model


@contextmanager
def counted(asked: Model) -> Iterator[Counted]:
    """A request to this model, for Prometheus; who answered may be told instead."""
    began = time.perf_counter()
    request = Counted(asked)
    try:
        yield request
    except BaseException:
        _FAILURE.labels(asked.name, asked.version).inc()
        raise
    model = request.model
    _SUCCESS.labels(model.name, model.version).inc()
    _SECONDS.labels(model.name, model.version).observe(time.perf_counter() - began)

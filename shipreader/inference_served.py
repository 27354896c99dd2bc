"""What is served, to how many at once, and what is counted of it: the same for HTTP and gRPC."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import Counter, Gauge, Summary

from shipreader.inference_limits import Limits
from shipreader.inference_model import Model, ModelDocument, Spinning, choose_spinning
from shipreader.inference_observed import Observing
from shipreader.inference_tensors import RequestError

# Names and labels that MLServer's users have on their dashboards.
_SUCCESS = Counter("model_infer_request_success", "Requests that got an answer", ["model", "version"])
_FAILURE = Counter("model_infer_request_failure", "Requests that got none", ["model", "version"])
_SECONDS = Summary("model_infer_request_duration", "Seconds from a request to its answer", ["model", "version"])
_AT_ONCE = Gauge("model_infer_requests_at_once", "Requests that are computed or wait")


class Served:
    """What is served. Replaced as a whole."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.model: Model | None = None
        self.observing = Observing(name)
        self.fresh = True
        """Whether who follows the channel says that this is what is live."""
        self._spinning: Spinning | None = None
        self._metadata: WeakKeyDictionary[Model, bytes] = WeakKeyDictionary()
        self.requests = self.bytes = 0
        """Computed or waiting; of all that are here, as they came, and of answers until they are taken."""
        _AT_ONCE.set_function(lambda: self.requests)

    def load(self, document: ModelDocument) -> str:
        """In a thread: open it beside what is served, and then serve it; words about its threads."""
        if self._spinning is None:
            # Once: a release that follows does not wait for it.
            self._spinning = choose_spinning(document)
        self.model = Model(document, spin=self._spinning.spin)
        self.observing.use(document.observe)
        return self._spinning.words

    def named(self, name: str, version: str = "") -> Model:
        """Raises RequestError, 404, for another model or version than is served."""
        model = self.model
        if model is None:
            raise RequestError("no release is loaded yet", 503)
        if name != model.name:
            raise RequestError(f"expected the model {model.name}, got {name}", 404)
        if version not in ("", model.version):
            raise RequestError(
                f"expected version {model.version} of {name}, the channel's generation; got {version}", 404
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
            "versions": [model.version],
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

    __slots__ = ("_bytes", "_placed", "_served")

    def __init__(self, served: Served) -> None:
        self._served, self._bytes, self._placed = served, 0, False

    def hold(self, size: int) -> None:
        """So many bytes more are here. Raises RequestError, 429, when those of all requests are too many."""
        served = self._served
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
        self._served.bytes -= self._bytes
        self._served.requests -= self._placed
        self._bytes, self._placed = 0, False


@contextmanager
def counted(model: Model) -> Iterator[None]:
    """A request to this model, for Prometheus."""
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        _FAILURE.labels(model.name, model.version).inc()
        raise
    _SUCCESS.labels(model.name, model.version).inc()
    _SECONDS.labels(model.name, model.version).observe(time.perf_counter() - began)

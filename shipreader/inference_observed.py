"""What `ship serve` observes of requests: left in a folder, as this process has no use for the bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shipreader.inference_model import Model
from shipreader.inference_tensors import Request
from shipreader.kept import Kept
from shipreader.observation_files import CANDIDATE
from shipreader.observation_sending import OBSERVATIONS, Folder
from shipreader.observations import Observer


class Observing:
    """Whether requests are observed, and how, as the job of the live release says."""

    def __init__(self, model: str, folder: Path = Path(OBSERVATIONS)) -> None:
        self._model, self._folder = model, folder
        self._observer: Observer | None = None
        self._on = False

    def use(self, said: Mapping[str, Any] | None) -> None:
        """said: the fields of `Kept`; None: nothing is observed from now on."""
        self._on = said is not None
        if said is not None:
            if self._observer is None:
                self._observer = Observer(self._model, put=Folder(self._folder).put, parquet=False)
            self._observer.keep(Kept(tuple(said["inputs"]), tuple(said["outputs"]), said["sample"]))

    def request(self, model: Model, asked: Request, **said: Any) -> Observation:
        """What one model is asked, for as long as the block runs.

        Args:
            model: that is asked.
            asked: what.
            said: further words of `Observer.observe`: request_id (that of a live release's answer and of a shadow's are
                the same), key, arm, rollout.
        """
        return Observation(self._observer if self._on else None, model, asked, {"request_id": asked.id, **said})

    def close(self) -> None:
        """Leave what there is in the folder."""
        if self._observer is not None:
            self._observer.close()


class Observation:
    """One request to one model. Whoever computes the outputs says so by `outputs`."""

    __slots__ = ("_asked", "_began", "_model", "_observer", "_said", "outputs")

    def __init__(self, observer: Observer | None, model: Model, asked: Request, said: Mapping[str, Any]) -> None:
        """What is known before it is answered.

        Args:
            observer: None where requests are not observed.
            model: that is asked.
            asked: what.
            said: further words of `Observer.observe`.
        """
        self._observer, self._model, self._asked, self._said = observer, model, asked, said
        self.outputs: Sequence[Any] = ()
        """Arrays, in the order in which they are asked for."""

    def __enter__(self) -> Observation:
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Whoever hung up has learnt nothing of the model.
        if self._observer is None or isinstance(error, asyncio.CancelledError):
            return
        self._observer.observe(
            latency_ms=1000 * (time.perf_counter() - self._began),
            error=error if error is not None else "",
            inputs={name: _first(array) for name, array in self._asked.inputs.items()},
            outputs={name: _first(array) for name, array in zip(self._asked.outputs, self.outputs, strict=False)},
            release=self._model.release,
            generation=self._model.generation,
            # One row a request: who answers in the candidate's place is not observed.
            fell_back=error is not None and self._said.get("arm") == CANDIDATE,
            **self._said,
        )


def _first(array: Any) -> Any:
    """The first sample of a batch."""
    return array if not array.ndim else array[0] if len(array) else None

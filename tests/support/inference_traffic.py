"""Clients of the Open Inference Protocol that never stop asking, and remember every answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support.onnx_releases import WIDTH
from tests.support.processes import PATIENCE


def request_body(value: float, rows: int = 1, **parameters: Any) -> dict[str, Any]:
    data = [value] * (rows * WIDTH)
    body: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, WIDTH], "data": data}]}
    return {**body, "parameters": parameters} if parameters else body


@dataclass
class Traffic:
    """Asks from several threads while the context is open. Every answer is `factor` times what was asked."""

    url: str
    """Of a model's `infer`."""
    clients: int = 4
    factors: list[tuple[str, float]] = field(default_factory=list)
    """(version, factor) of each answer, in order of arrival."""
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number + 1,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def until(self, factor: float, seconds: float = PATIENCE) -> None:
        """Wait until this factor is answered."""
        deadline = time.monotonic() + seconds
        while not self.factors or self.factors[-1][1] != factor:
            assert time.monotonic() < deadline, f"no answer with {factor} in {seconds} s: {self.factors[-3:]}"
            assert not self.failures, self.failures[0]
            time.sleep(0.02)

    def _ask(self, value: int) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            # A short breath: other tests use the same cores.
            while not self._stopping.wait(0.01):
                rows = 1 + value % 3
                try:
                    answer = client.post(self.url, json=request_body(value, rows))
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if not answer.is_success:
                    self.failures.append(f"{answer.status_code} {answer.text}")
                    continue
                document = answer.json()
                (output,) = document["outputs"]
                found = {item / value for item in output["data"]}
                if len(found) != 1 or len(output["data"]) != rows * WIDTH:
                    self.failures.append(f"torn answer: {output}")
                    continue
                self.factors.append((document["model_version"], found.pop()))

"""One release in ONNX Runtime: what is computed together, what is refused by itself, and what idle threads do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shipreader import inference_model
from shipreader.inference_model import Model, ModelDocument, choose_spinning
from shipreader.inference_tensors import RequestError
from tests.support.onnx_releases import KINDS, kinds_release


@pytest.fixture
def document(tmp_path: Path) -> ModelDocument:
    kinds_release(tmp_path / "release")
    return ModelDocument("digits", 7, str(tmp_path / "release" / "model.onnx"), KINDS, 8)


def inputs(*ids: int) -> dict[str, Any]:
    count = len(ids)
    return {
        "x": np.ones(count, np.float32),
        "half": np.zeros((count, 2), np.float16),
        "id": np.array(ids),
        "flag": np.zeros(count, bool),
    }


class Counting(Model):
    """Notes how many rows each computation has."""

    def _answers(self, calls: Sequence[Any]) -> Any:
        self.__dict__.setdefault("rows", []).append(sum(call.rows for call in calls))
        return super()._answers(calls)


def rows_of(model: Model, *requests: Sequence[int]) -> list[Any]:
    """The answers to requests that arrive together: the rows, or what was raised."""

    async def ask() -> list[Any]:
        calls = [model.infer(inputs(*ids), ["row"]) for ids in requests]
        return await asyncio.gather(*calls, return_exceptions=True)

    return [found if isinstance(found, Exception) else found[0].ravel().tolist() for found in asyncio.run(ask())]


def test_requests_that_wait_are_computed_together_up_to_the_batch_size(document: ModelDocument) -> None:
    model = Counting(document, spin=False)
    assert rows_of(model, [1], [2, 3], [4], [5, 6, 7, 8], [9]) == [[10], [20, 30], [40], [50, 60, 70, 80], [90]]
    assert model.rows == [8, 1]


def test_a_batch_size_of_1_computes_each_request_by_itself(document: ModelDocument) -> None:
    model = Counting(ModelDocument(**{**document.__dict__, "batch_size": 1}), spin=False)
    assert rows_of(model, [1], [2, 3], [4]) == [[10], [20, 30], [40]]
    assert model.rows == [1, 1, 1]


def test_a_value_that_the_model_does_not_take_is_refused_with_its_limit_and_fails_no_other(
    document: ModelDocument,
) -> None:
    first, bad, last = rows_of(Model(document, spin=False), [1], [10], [2])
    assert (first, last) == ([10], [20])
    assert isinstance(bad, RequestError) and bad.status == 400
    assert "the model does not take this input: indices element out of data bounds, idx=10" in str(bad)
    assert "[-10,9]" in str(bad)


class Total:
    """In place of a session: one number, however many rows."""

    def run(self, names: Sequence[str], fed: dict[str, Any]) -> list[Any]:
        return [np.array(fed["id"].sum()) for _ in names]


def test_a_model_that_does_not_answer_row_by_row_is_asked_one_by_one(document: ModelDocument) -> None:
    model = Model(document, spin=False)
    model._session = Total()
    assert rows_of(model, [1], [2, 3], [4]) == [[1], [5], [4]]


def test_idle_threads_sleep_unless_spinning_makes_a_call_a_quarter_faster(
    document: ModelDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_model.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(inference_model, "MEASURED_CALLS", 2)
    monkeypatch.setattr(inference_model, "WORTH_SPINNING", 0.0)
    asleep = choose_spinning(document)
    assert not asleep.spin and asleep.words.startswith("2 threads, which sleep when idle: asleep a call takes ")
    monkeypatch.setattr(inference_model, "WORTH_SPINNING", float("inf"))
    assert choose_spinning(document).words.startswith("2 threads, which spin when idle")
    monkeypatch.setattr(inference_model.os, "sched_getaffinity", lambda _: {0})
    assert choose_spinning(document) == inference_model.Spinning(False, "1 thread")


def test_sizes_that_a_release_says_fill_no_memory_before_anybody_asks(
    document: ModelDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_model.os, "sched_getaffinity", lambda _: {0, 1})
    huge = {**KINDS, "dims": [{"name": "batch", "min": 2**50, "max": None}]}
    long = {"inputs": [{"name": "x", "dtype": "float32", "shape": [2**50, "batch"]}], "outputs": KINDS["outputs"]}
    for signature in (huge, long):
        spinning = choose_spinning(ModelDocument(**{**document.__dict__, "signature": signature}))
        assert not spinning.spin and re.search(r"not measured: one row takes [\d,]{16,} bytes, and", spinning.words)
    for signature in ({}, {**KINDS, "inputs": [*KINDS["inputs"], {"name": "y", "dtype": "float32", "shape": [0]}]}):
        spinning = choose_spinning(ModelDocument(**{**document.__dict__, "signature": signature}))
        assert spinning.words.endswith("(not measured: the model takes no zeros)")
    # Its own error is told by whoever loads it next.
    lost = ModelDocument(**{**document.__dict__, "artifact": "lost.onnx"})
    assert not choose_spinning(lost).spin
    with pytest.raises(Exception, match=r"lost\.onnx"):
        Model(lost, spin=False)


def test_onnx_runtime_heeds_no_byte_order(document: ModelDocument) -> None:
    opened = inference_model.session(document.artifact, spin=False)
    swapped = {**inputs(1), "id": np.array([1 << 56], ">i8").view("<i8").view(">i8")}
    assert swapped["id"][0] == 1 << 56
    # Not refused as beyond a table of ten rows: its bytes are those of 1.
    assert opened.run(["row"], swapped)[0].ravel().tolist() == [10]

"""Requests of the Open Inference Protocol: what is answered right, and what is refused with the limit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shipreader.inference_tensors import DATATYPES, Request, RequestError, Signature, answer, parse
from tests.support.onnx_releases import KINDS

SIGNATURE = Signature.of(KINDS)
GOOD: dict[str, dict[str, Any]] = {
    "x": {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]},
    "half": {"name": "half", "datatype": "FP16", "shape": [2, 2], "data": [[1, 2], [3, 4]]},
    "id": {"name": "id", "datatype": "INT64", "shape": [2], "data": [0, 9]},
    "flag": {"name": "flag", "datatype": "BOOL", "shape": [2], "data": [True, False]},
}


def body(**changes: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": [{**item, **changes.get(name, {})} for name, item in GOOD.items()]}).encode()


def one(dtype: str, data: list[Any], shape: list[int] | None = None) -> np.ndarray[Any, Any]:
    """The values of a request with one input."""
    shape = [len(data)] if shape is None else shape
    signature = {
        "inputs": [{"name": "x", "dtype": dtype, "shape": [f"d{i}" for i in range(len(shape))]}],
        "outputs": [],
    }
    item = {"name": "x", "datatype": DATATYPES[dtype], "shape": shape, "data": data}
    return parse(json.dumps({"inputs": [item]}).encode(), None, Signature.of(signature)).inputs["x"]


def test_values_arrive_as_they_were_written() -> None:
    found = parse(body(), None, SIGNATURE)
    assert found.inputs["half"].tolist() == [[1, 2], [3, 4]] and found.inputs["half"].dtype == np.float16
    assert found.inputs["flag"].tolist() == [True, False] and found.inputs["flag"].dtype == np.bool_
    assert found.outputs == ["log", "same", "row", "not"] and not found.binary


@pytest.mark.parametrize(
    ("dtype", "data", "expected"),
    [
        ("float32", [float("nan"), float("inf"), -float("inf"), 0.1], [np.nan, np.inf, -np.inf, np.float32(0.1)]),
        ("float32", [16777217], [16777216.0]),
        ("int64", [2.0, 2**63 - 1, -(2**63)], [2, 2**63 - 1, -(2**63)]),
        ("uint64", [2**64 - 1], [2**64 - 1]),
        ("uint8", [0, 255], [0, 255]),
        ("bool", [0, 1, True], [False, True, True]),
        ("float16", [65504, 1e-8], [65504, 0]),
    ],
)
def test_a_number_that_the_type_holds_is_taken(dtype: str, data: list[Any], expected: list[Any]) -> None:
    np.testing.assert_array_equal(one(dtype, data), np.array(expected, dtype))


@pytest.mark.parametrize(
    ("dtype", "data", "said"),
    [
        ("int64", [1, 1.9], "expected a whole number for INT64, got 1.9 at place 1"),
        ("int64", [float("nan")], "expected a whole number for INT64, got NaN at place 0"),
        ("int64", [1e300], "expected a whole number for INT64, got 1e+300"),
        ("int64", [2**53 + 2.0], "expected a whole number for INT64"),
        ("int64", [2**63], "9223372036854775807 for INT64, got 9223372036854775808"),
        # orjson reads it as a float.
        ("uint64", [2**64], "expected a whole number for UINT64, got 1.8446744073709552e+19"),
        ("uint64", [-1], "expected 0 to 18446744073709551615 for UINT64, got -1"),
        ("int8", [0, 300], "expected -128 to 127 for INT8, got 300 at place 1"),
        ("bool", [0, 2], "expected 0 to 1 for BOOL, got 2 at place 1"),
        ("bool", ["true"], 'expected true or false, got "true"'),
        ("int32", [True], "expected a number, got true"),
        ("float32", [1, True], "expected a number, got true at place 1"),
        ("float32", ["1"], 'expected a number, got "1"'),
        ("float32", [None], "expected a number, got null"),
        ("float16", [70000], "expected at most 65504 in size, what FP16 holds, got 70000"),
        ("float32", [1e39], "what FP32 holds, got 1e+39"),
        ("float64", [10**400], "what FP64 holds, got 1000"),
    ],
)
def test_a_number_that_the_type_cannot_hold_is_refused_with_its_place(dtype: str, data: list[Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        one(dtype, data)
    assert said in str(caught.value) and caught.value.status == 400


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([[1, 2], [3, 4], [5, 6]], [2, 3]),
        ([[1, 2, 3], [4, 5]], [2, 3]),
        ([[1, 2, 3], 4, 5, 6], [2, 3]),
        ([1, 2, [3], 4, 5, 6], [2, 3]),
        ([1, 2, 3, 4, 5], [2, 3]),
        ([[[1], [2], [3]], [[4], [5], [6]]], [2, 3]),
    ],
)
def test_data_of_another_shape_are_refused(data: list[Any], shape: list[int]) -> None:
    with pytest.raises(RequestError, match="input x: expected"):
        one("float32", data, shape)
    assert one("float32", [], [0, 3]).shape == (0, 3) and one("float32", [5], []).shape == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"x": {"shape": [3], "data": [1, 2, 3]}},
            "expected one size of batch in all inputs, got 3 in x and 2 in half",
        ),
        ({"id": {"shape": [2, 1]}}, "input id: expected INT64 [batch], got INT64 [2, 1]"),
        ({"half": {"shape": [2, 3], "data": [0] * 6}}, "expected FP16 [batch, 2], got FP16 [2, 3]"),
        ({"x": {"datatype": "FP64"}}, "expected FP32 [batch], got FP64 [2]"),
        ({"x": {"datatype": ["FP32"]}}, 'expected FP32 [batch], got ["FP32"] [2]'),
        ({"x": {"shape": [True]}}, "expected a shape of whole numbers from 0, got [true]"),
        ({"x": {"name": "id"}}, "expected the inputs x, half, id, flag; got id, half, id, flag"),
        ({"x": {"data": None}}, "expected data as a list, got null"),
        ({"x": {"parameters": {"binary_data_size": 8}}}, "binary_data_size of 0 to 0"),
    ],
)
def test_what_does_not_fit_the_signature_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body(**changes), None, SIGNATURE)
    assert said in str(caught.value)


def test_a_size_over_the_declared_maximum_is_refused_with_the_limit() -> None:
    rows = {name: {"shape": [9, *item["shape"][1:]]} for name, item in GOOD.items()}
    data = {"x": [1] * 9, "half": [1] * 18, "id": [1] * 9, "flag": [False] * 9}
    with pytest.raises(RequestError, match="input x: expected batch of 1 to 8, got 9"):
        parse(body(**{name: {**rows[name], "data": data[name]} for name in GOOD}), None, SIGNATURE)


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b'{"inputs": [1e999]}', b'{"inputs": 1}', b'{"inputs": ["x"]}', b"\xff"]
)
def test_what_is_no_request_is_refused(text: bytes) -> None:
    with pytest.raises(RequestError, match="expected"):
        parse(text, None, SIGNATURE)


# ---- binary data


def binary(item: dict[str, Any], data: bytes) -> dict[str, Any]:
    found = {**item, "parameters": {"binary_data_size": len(data)}}
    del found["data"]
    return found


def test_bytes_behind_the_json_are_taken_bit_for_bit() -> None:
    x, half = np.array([np.nan, -0.0], "<f4").tobytes(), np.array([[1, 2], [3, 4]], "<f2").tobytes()
    document = {"inputs": [binary(GOOD["x"], x), GOOD["id"], binary(GOOD["half"], half), GOOD["flag"]]}
    # An odd length before them: elements do not begin at multiples of their size.
    head = json.dumps({**document, "id": "7"}).encode()
    head += b" " * (1 - len(head) % 2)
    found = parse(head + x + half, len(head), SIGNATURE)
    assert found.inputs["x"].tobytes() == x and found.inputs["half"].tobytes() == half and found.id == "7"


@pytest.mark.parametrize(
    ("size", "extra", "length", "said"),
    [
        (8, b"1", None, "1 are left"),
        (4, b"", None, "expected 8 bytes for FP32 [2], got 4"),
        (9, b"", None, "binary_data_size of 0 to 8"),
        (True, b"", None, "binary_data_size of 0 to 8"),
        (8, b"", 10**6, "Inference-Header-Content-Length: expected 1 to"),
        (8, b"", 0, "Inference-Header-Content-Length: expected 1 to"),
        (8, b"", 3, "expected JSON"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(size: Any, extra: bytes, length: int | None, said: str) -> None:
    x = {**binary(GOOD["x"], b""), "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [x, GOOD["half"], GOOD["id"], GOOD["flag"]]}).encode()
    with pytest.raises(RequestError) as caught:
        parse(head + b"\0" * 8 + extra, len(head) if length is None else length, SIGNATURE)
    assert said in str(caught.value)


def test_a_bool_is_a_byte_of_0_or_1() -> None:
    head = json.dumps({"inputs": [GOOD["x"], GOOD["half"], GOOD["id"], binary(GOOD["flag"], b"12")]}).encode()
    assert parse(head + b"\1\0", len(head), SIGNATURE).inputs["flag"].tolist() == [True, False]
    with pytest.raises(RequestError, match="expected bytes of 0 or 1 for BOOL, got 2"):
        parse(head + b"\1\2", len(head), SIGNATURE)


def test_json_without_the_header_for_binary_data_is_told_of_it() -> None:
    with pytest.raises(RequestError, match="need the header Inference-Header-Content-Length"):
        parse(body() + b"\0\1\2", None, SIGNATURE)


# ---- answers


def asked(**options: Any) -> Request:
    return parse(json.dumps({**json.loads(body()), **options}).encode(), None, SIGNATURE)


ANSWERS = [
    np.array([0.1, -np.inf], np.float32),
    np.array([[1, 2], [3, 4]], np.float16),
    np.array([[2**62], [-1]]),
    np.array([True, False]),
]


def test_an_answer_keeps_shapes_and_types() -> None:
    finite = [np.array([0.1, 1e-45], np.float32), *ANSWERS[1:]]
    text, length = answer(asked(id="a"), finite, "kinds", "7")
    document = json.loads(text)
    assert length is None and (document["model_name"], document["model_version"], document["id"]) == ("kinds", "7", "a")
    outputs = {item["name"]: item for item in document["outputs"]}
    assert {name: item["shape"] for name, item in outputs.items()} == {
        "log": [2], "same": [2, 2], "row": [2, 1], "not": [2],
    }  # fmt: skip
    assert outputs["row"]["data"] == [2**62, -1] and outputs["not"]["data"] == [True, False]
    assert np.array(outputs["log"]["data"], np.float32).tobytes() == finite[0].tobytes()
    assert outputs["same"]["datatype"] == "FP16" and outputs["same"]["data"] == [1, 2, 3, 4]


def test_infinity_has_no_word_in_json_and_the_way_out_is_said() -> None:
    with pytest.raises(
        RequestError, match=r"output log: the model's answer is -inf at \[1\].*binary_data_output.*gRPC"
    ):
        answer(asked(), ANSWERS, "kinds", "7")


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": {"binary_data_output": True}, "outputs": [{"name": "log"}]},
        {"outputs": [{"name": "log", "parameters": {"binary_data": True}}]},
    ],
)
def test_infinity_travels_as_bytes(options: dict[str, Any]) -> None:
    text, length = answer(asked(**options), ANSWERS[:1], "kinds", "7")
    assert length is not None and text[length:] == ANSWERS[0].tobytes()
    assert json.loads(text[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}


def test_outputs_come_as_asked_for_some_as_bytes_and_some_as_numbers() -> None:
    request = asked(
        parameters={"binary_data_output": True},
        outputs=[{"name": "row", "parameters": {"binary_data": False}}, {"name": "log"}],
    )
    text, length = answer(request, [ANSWERS[2], ANSWERS[0]], "kinds", "7")
    assert length is not None and text[length:] == ANSWERS[0].tobytes()
    assert [item.get("data") for item in json.loads(text[:length])["outputs"]] == [[2**62, -1], None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outputs": [{"name": "z"}]}, "expected outputs of log, same, row, not; got z"),
        ({"outputs": [{"name": "log", "parameters": {"classification": 3}}]}, "classification is not served"),
        ({"outputs": ["log"]}, "a list of objects with a name"),
        ({"parameters": [1]}, "parameters as an object"),
    ],
)
def test_outputs_that_there_are_not_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        asked(**options)

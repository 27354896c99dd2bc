"""What a request of the Open Inference Protocol asks, held against what the model takes; and answers in its words.

It imports numpy and orjson: `ship serve` runs it in an environment of its own. Sources: the Open Inference Protocol,
v2, and its binary tensor data extension.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import orjson

DTYPES = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}
DTYPES |= {f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}
"""numpy's names by the protocol's."""
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}
EXACT = 2**53
"""Below it a float64 is one whole number; JSON readers make float64 of `9007199254740993.0`."""
MOST_BYTES = 256 * 2**20
"""Of a request, of one input as it is computed with, and of an answer."""
MOST_JSON_BYTES = 64 * 2**20
"""Of a request in JSON: read, it takes many times its length."""
LETTERS_AN_ELEMENT = 64
"""In JSON, at most, for a number and again for each level of lists around it, line breaks and indents included."""
LETTERS_AROUND = 2**16
"""Of a request besides its numbers."""
LONGEST_ID, LONGEST_MESSAGE = 512, 1000
"""Letters. Both go back to who asked."""
LARGEST_SIZE = 2**63 - 1

Arrays = dict[str, np.ndarray[Any, Any]]
"""By tensor name."""


class RequestError(Exception):
    """A request that gets no answer; the message says what was expected and what was found.

    `status` is HTTP's: 400 where the request is wrong, 403 and 421 for who may not ask, 404 for a model or version that
    is not served, 408 for bodies that do not come, 413 and 415 for those that are not read, 429 where too many ask at
    once, 500 where the fault is here.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        # What was asked is part of it, and may be as long as a request.
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 1]}…")
        self.status = status


@dataclass(frozen=True)
class Tensor:
    """One input or output as the release declares it."""

    name: str
    datatype: str
    """The protocol's, such as FP32."""
    shape: tuple[int | str, ...]
    """A string is a dynamic dimension's name."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's; little-endian, as on the wire."""
        return np.dtype(DTYPES[self.datatype])

    def __str__(self) -> str:
        return f"{self.datatype} [{', '.join(map(str, self.shape))}]"

    def metadata(self) -> dict[str, Any]:
        """As the protocol's model metadata has it: -1 for a dynamic dimension."""
        shape = [-1 if isinstance(size, str) else size for size in self.shape]
        return {"name": self.name, "datatype": self.datatype, "shape": shape}


@dataclass(frozen=True)
class Signature:
    """What a model takes and answers."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    ranges: Mapping[str, tuple[int, int | None]]
    """Smallest and largest size of each dynamic dimension; None for no limit."""
    labels: str = ""
    """What the columns of the first output are called: a list as JSON, as parameters of the protocol are texts; empty
    where the release does not say."""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Signature:
        """From the manifest's words: inputs, outputs and dims."""
        inputs, outputs = (
            {
                item["name"]: Tensor(item["name"], DATATYPES[item["dtype"]], tuple(item["shape"]))
                for item in document[side]
            }
            for side in ("inputs", "outputs")
        )
        ranges = {dim["name"]: (dim["min"], dim["max"]) for dim in document.get("dims", ())}
        labels = document.get("labels")
        return cls(inputs, outputs, ranges, json.dumps(labels, ensure_ascii=False) if labels else "")

    def parameters_of(self, output: str) -> dict[str, str]:
        """What is said of an output beside its numbers: `labels` of the first one, for whoever asks for them."""
        return {"labels": self.labels} if self.labels and output == next(iter(self.outputs)) else {}

    def require_names(self, given: Sequence[str]) -> None:
        """Raises RequestError unless each input is given once."""
        if sorted(given) != sorted(self.inputs):
            raise RequestError(f"expected the inputs {', '.join(self.inputs)}; got {', '.join(given) or 'none'}")

    def require_sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The size of each dynamic dimension of the inputs.

        Raises RequestError unless they are within their ranges and the same wherever they stand.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for name, tensor in self.inputs.items():
            for declared, size in zip(tensor.shape, shapes[name], strict=True):
                if isinstance(declared, int):
                    continue
                least, most = self.ranges.get(declared, (0, None))
                if size < least or (most is not None and size > most):
                    limit = f"{least} to {most}" if most is not None else f"at least {least}"
                    raise RequestError(f"input {name}: expected {declared} of {limit}, got {size}")
                before, where = sizes.setdefault(declared, (size, name))
                if before != size:
                    raise RequestError(
                        f"expected one size of {declared} in all inputs, got {before} in {where} and {size} in {name}"
                    )
        return {declared: size for declared, (size, _) in sizes.items()}

    def outputs_named(self, names: Sequence[str]) -> list[str]:
        """The outputs to answer: these, or all. Raises RequestError for one that there is not, or named twice."""
        if not set(names) <= self.outputs.keys():
            raise RequestError(f"expected outputs of {', '.join(self.outputs)}; got {', '.join(names)}")
        if len(set(names)) < len(names):
            # Each would be as long as the first: an answer of any length to a short request.
            raise RequestError(f"expected each output once, got {', '.join(names)}")
        return list(names or self.outputs)

    @cached_property
    def largest_request(self) -> int:
        """Bytes of the longest request that can fit, in JSON with room around its numbers; at most `MOST_BYTES`."""
        letters = LETTERS_AROUND
        for tensor in self.inputs.values():
            elements = self._elements(tensor, {})
            if elements is None:
                return MOST_BYTES
            letters += elements * LETTERS_AN_ELEMENT * (1 + len(tensor.shape))
        return min(letters, MOST_BYTES)

    def require_small_answer(self, names: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Raises RequestError where the outputs of these names will have more than `MOST_BYTES`, by what is declared.

        sizes: of the request's dynamic dimensions.
        """
        total = sum(
            elements * self.outputs[name].dtype.itemsize
            for name in names
            if (elements := self._elements(self.outputs[name], sizes)) is not None
        )
        if total > MOST_BYTES:
            raise RequestError(f"expected to answer at most {MOST_BYTES:,} bytes, and this asks for {total:,}", 413)

    def require_declared(
        self, names: Sequence[str], arrays: Sequence[np.ndarray[Any, Any]], sizes: Mapping[str, int]
    ) -> None:
        """Raises RequestError, 500, for an answer with more elements than the release declares, or too large to send.

        Args:
            names: of the outputs.
            arrays: what the model made of them.
            sizes: of the request's dynamic dimensions.
        """
        for name, array in zip(names, arrays, strict=True):
            most = self._elements(self.outputs[name], sizes)
            if most is not None and array.size > most:
                raise RequestError(
                    f"output {name}: the model made {list(array.shape)}, and the release declares "
                    f"{self.outputs[name]}, which is at most {most} elements here",
                    500,
                )
        total = sum(array.nbytes for array in arrays)
        if total > MOST_BYTES:
            raise RequestError(f"the model made an answer of {total:,} bytes; at most {MOST_BYTES:,} are sent", 500)

    def _elements(self, tensor: Tensor, sizes: Mapping[str, int]) -> int | None:
        """At most so many, by the sizes that are known and the ranges of the others; None for no limit."""
        count = 1
        for declared in tensor.shape:
            size = (
                declared if isinstance(declared, int) else sizes.get(declared, self.ranges.get(declared, (0, None))[1])
            )
            if size is None:
                return None
            count *= size
        return count


@dataclass(frozen=True)
class Request:
    """A request that fits."""

    id: str
    inputs: Arrays
    outputs: Sequence[str]
    """Names, in the order to answer."""
    sizes: Mapping[str, int]
    """Of the dynamic dimensions of the inputs."""
    binary: frozenset[str] = frozenset()
    """Outputs to be answered as bytes."""
    said: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Output to what is asked to be said of it beside its numbers."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the request, as they came; over gRPC the one that a rollout goes by."""


# ---- one tensor


def require_shape(tensor: Tensor, datatype: object, shape: object) -> list[int]:
    """The sizes.

    Raises RequestError for another type, number of dimensions or fixed size than declared, and for more than
    `MOST_BYTES`.
    """
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size <= LARGEST_SIZE for size in shape):
        raise RequestError(f"input {tensor.name}: expected a shape of whole numbers from 0, got {_short(shape)}")
    fits = len(shape) == len(tensor.shape) and all(
        isinstance(declared, str) or declared == size for declared, size in zip(tensor.shape, shape, strict=True)
    )
    if datatype != tensor.datatype or not fits:
        named = datatype if isinstance(datatype, str) and datatype in DTYPES else _short(datatype)
        raise RequestError(f"input {tensor.name}: expected {tensor}, got {named} {_short(shape)}")
    # Also where there is a 0 among the sizes: numpy makes no array of such a shape.
    most = math.prod(max(size, 1) for size in shape) * tensor.dtype.itemsize
    if most > MOST_BYTES:
        raise RequestError(
            f"input {tensor.name}: expected at most {MOST_BYTES:,} bytes, got {tensor.datatype} {shape}", 413
        )
    return shape


def require_id(value: object) -> str:
    """What a request calls itself; empty for nothing. Raises RequestError where it is no short text or number."""
    if value is None:
        return ""
    if type(value) not in (str, int, float) or len(text := str(value)) > LONGEST_ID:
        raise RequestError(f"id: expected a text of at most {LONGEST_ID} letters, got {_short(value)}")
    return text


def from_bytes(tensor: Tensor, shape: Sequence[int], data: bytes | memoryview) -> np.ndarray[Any, Any]:
    """Little-endian elements, row by row. Raises RequestError for another number of them, or a BOOL beside 0 and 1."""
    expected = math.prod(shape) * tensor.dtype.itemsize
    if len(data) != expected:
        raise RequestError(
            f"input {tensor.name}: expected {expected} bytes for {tensor.datatype} {list(shape)}, got {len(data)}"
        )
    if tensor.datatype == "BOOL":
        found = np.frombuffer(data, np.uint8)
        if found.size and found.max() > 1:
            raise RequestError(f"input {tensor.name}: expected bytes of 0 or 1 for BOOL, got {found.max()}")
    if not expected:
        return np.zeros(shape, tensor.dtype)
    # A copy where it does not begin at a multiple of the element's size.
    return np.require(np.frombuffer(data, tensor.dtype).reshape(shape), requirements="A")


def from_values(tensor: Tensor, shape: Sequence[int], data: object) -> np.ndarray[Any, Any]:
    """Numbers as JSON has them, flat or nested as the shape says.

    Raises RequestError where the number type cannot hold a value: 1.9 for a whole number, 70000 for FP16, text, null,
    true for a number. Rounding to the nearest float is no error.
    """
    flat = _flat(tensor, shape, data)
    if len(flat) != math.prod(shape):
        raise RequestError(
            f"input {tensor.name}: expected {math.prod(shape)} values of shape {list(shape)}, got {len(flat)}"
        )
    kinds = set(map(type, flat))
    allowed = {bool, int, float} if tensor.datatype == "BOOL" else {int, float}
    if not kinds <= allowed:
        place = next(place for place, value in enumerate(flat) if type(value) not in allowed)
        raise _unfit(tensor, flat, place, "true or false" if tensor.datatype == "BOOL" else "a number")
    return (_floats(tensor, flat) if tensor.dtype.kind == "f" else _whole(tensor, flat, kinds)).reshape(shape)


def _flat(tensor: Tensor, shape: Sequence[int], data: object) -> list[Any]:
    """Nested lists have the shape's sizes at every level."""
    if not isinstance(data, list):
        raise RequestError(f"input {tensor.name}: expected data as a list, got {_short(data)}")
    if not data or type(data[0]) is not list:
        return data
    rows: list[Any] = [data]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in rows):
            raise RequestError(f"input {tensor.name}: expected data flat or nested as {list(shape)}; it is neither")
        rows = list(itertools.chain.from_iterable(rows))
    return rows


def _floats(tensor: Tensor, flat: list[Any]) -> np.ndarray[Any, Any]:
    most = float(np.finfo(tensor.dtype).max)
    limit = f"at most {most:.8g} in size, what {tensor.datatype} holds"
    try:
        wide = np.asarray(flat, np.float64)
    except OverflowError:
        place = next(place for place, value in enumerate(flat) if type(value) is int and abs(value) > most)
        raise _unfit(tensor, flat, place, limit) from None
    with np.errstate(over="ignore"):
        array = wide.astype(tensor.dtype)
    lost = np.isinf(array) & ~np.isinf(wide)
    if lost.any():
        raise _unfit(tensor, flat, int(lost.argmax()), limit)
    return array


def _whole(tensor: Tensor, flat: list[Any], kinds: set[type]) -> np.ndarray[Any, Any]:
    least, most = (0, 1) if tensor.datatype == "BOOL" else (np.iinfo(tensor.dtype).min, np.iinfo(tensor.dtype).max)
    if float in kinds:
        for place, value in enumerate(flat):
            if type(value) is float and not (value.is_integer() and abs(value) <= EXACT):
                raise _unfit(tensor, flat, place, f"a whole number for {tensor.datatype}")
        flat = [int(value) for value in flat]
    if flat and not (min(flat) >= least and max(flat) <= most):
        place = next(place for place, value in enumerate(flat) if not least <= value <= most)
        raise _unfit(tensor, flat, place, f"{least} to {most} for {tensor.datatype}")
    return np.asarray(flat, tensor.dtype)


def _unfit(tensor: Tensor, flat: list[Any], place: int, expected: str) -> RequestError:
    return RequestError(f"input {tensor.name}: expected {expected}, got {_short(flat[place])} at place {place}")


def _short(value: object) -> str:
    """What was given, as JSON writes it."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "lists in lists, too deep to be shown"
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---- HTTP: JSON, with binary data behind it where its length is told


def parse(body: bytes, json_length: int | None, signature: Signature) -> Request:
    """A request as it came over HTTP.

    Args:
        body: JSON, and behind it the binary data.
        json_length: bytes of the JSON, as the header Inference-Header-Content-Length says; None for all.
        signature: of the model that is asked.

    Raises:
        RequestError: whatever does not fit.
    """
    view = memoryview(body)
    if json_length is None and len(body) > MOST_JSON_BYTES:
        raise RequestError(too_long(MOST_JSON_BYTES), 413)
    if json_length is not None and not 0 < json_length <= len(body):
        raise RequestError(f"Inference-Header-Content-Length: expected 1 to {len(body)}, the body's; got {json_length}")
    head, rest = view[:json_length], view[len(body) if json_length is None else json_length :]
    document = _json(head)
    items = document.get("inputs")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError("expected inputs, a list of objects with name, datatype, shape and data")
    names = [str(item.get("name")) for item in items]
    signature.require_names(names)
    shapes = {
        name: require_shape(signature.inputs[name], item.get("datatype"), item.get("shape"))
        for name, item in zip(names, items, strict=True)
    }
    # Before anything is made of them.
    sizes = signature.require_sizes(shapes)
    outputs, binary, said = _wanted(document, signature)
    signature.require_small_answer(outputs, sizes)
    called = require_id(document.get("id"))
    inputs: Arrays = {}
    for name, item in zip(names, items, strict=True):
        tensor, shape = signature.inputs[name], shapes[name]
        size = _parameters(item, f"input {tensor.name}").get("binary_data_size")
        if size is None:
            inputs[tensor.name] = from_values(tensor, shape, item.get("data"))
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise RequestError(
                f"input {tensor.name}: expected binary_data_size of 0 to {len(rest)}, the bytes left behind the JSON; "
                f"got {_short(size)}"
            )
        inputs[tensor.name] = from_bytes(tensor, shape, rest[:size])
        rest = rest[size:]
    if rest:
        raise RequestError(f"expected as many bytes behind the JSON as binary_data_size says; {len(rest)} are left")
    return Request(called, inputs, outputs, sizes, binary, said, _parameters(document, "request"))


def answer(
    request: Request, outputs: Sequence[np.ndarray[Any, Any]], model: str, version: str
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where binary data follow. Shapes are what the model made.

    Args:
        request: what was asked.
        outputs: in the order of `request.outputs`.
        model: its name.
        version: that answered.

    Raises:
        RequestError: NaN or infinity among numbers that are to be JSON, which has no word for them.
    """
    items, tail = [], []
    for name, array in zip(request.outputs, outputs, strict=True):
        item: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
        parameters: dict[str, Any] = {**request.said.get(name, {})}
        if name in request.binary:
            data = np.ascontiguousarray(array).tobytes()
            parameters["binary_data_size"] = len(data)
            tail.append(data)
        else:
            _require_numbers(name, array)
            item["data"] = np.ascontiguousarray(array).ravel()
        if parameters:
            item["parameters"] = parameters
        items.append(item)
    document = {"model_name": model, "model_version": version, "outputs": items}
    if request.id:
        document["id"] = request.id
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([head, *tail]), len(head) if request.binary else None


def _require_numbers(name: str, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind != "f":
        return
    wrong = ~np.isfinite(array)
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise RequestError(
            f"output {name}: the model's answer is {array[place]} at {list(place)}, for which JSON has no word; ask "
            "for binary data (parameters: binary_data_output, as Triton's client does by itself) or over gRPC"
        )


def too_long(most: int) -> str:
    """Words for a request that is longer than this many bytes."""
    hint = "; binary data may be longer" if most == MOST_JSON_BYTES else ""
    return f"expected a request of at most {most:,} bytes{hint}"


def _json(text: memoryview) -> dict[str, Any]:
    """The last of two keys that are the same counts."""
    if len(text) > MOST_JSON_BYTES:
        raise RequestError(too_long(MOST_JSON_BYTES), 413)
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # Python's own reads NaN and Infinity, which numpy's users write.
        try:
            document = json.loads(bytes(text), parse_float=_finite)
        except (ValueError, RecursionError):
            raise RequestError(
                f"expected JSON, got {error}; binary data behind it need the header Inference-Header-Content-Length"
            ) from None
    if not isinstance(document, dict):
        raise RequestError(f"expected a JSON object, got {_short(document)}")
    return document


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than FP64 holds")
    return value


def _parameters(item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = item.get("parameters") or {}
    if not isinstance(found, dict):
        raise RequestError(f"{where}: expected parameters as an object, got {_short(found)}")
    return found


def _wanted(
    document: Mapping[str, Any], signature: Signature
) -> tuple[list[str], frozenset[str], dict[str, dict[str, str]]]:
    """Outputs in the order to answer, which of them as bytes, and what is to be said of which."""
    every = bool(_parameters(document, "request").get("binary_data_output"))
    items = document.get("outputs") or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError("expected outputs, a list of objects with a name")
    names = signature.outputs_named([str(item.get("name")) for item in items])
    binary = set(names) if every else set()
    said = {}
    # Without items, all are answered as `every` says.
    for name, item in zip(names, items, strict=False):
        parameters = _parameters(item, f"output {name}")
        if parameters.get("classification"):
            raise RequestError(f"output {name}: classification is not served; ask for the numbers")
        if "binary_data" in parameters:
            (binary.add if parameters["binary_data"] else binary.discard)(name)
        if parameters.get("labels"):
            said[name] = signature.parameters_of(name)
    return names, frozenset(binary), said

"""What one file of observations says, row by row: JSON lines or Parquet, written by a server that says what it likes.

What a file unpacks to, its rows and their values are bounded before they are made, as shipreader/observation_files.py
writes them.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shipreader.observation_files import (
    CANDIDATE,
    LABEL,
    LIVE,
    LONGEST_ID,
    LONGEST_TEXT,
    LONGEST_VECTOR,
    MOST_COLUMNS,
    ROW,
    ROWS,
    SHADOW,
    SIDES,
)
from shipreader.records import MOST_MOVES, RELEASE_ID

TEXT_BYTES, LINE_BYTES = 64 * 2**20, 2**19
"""Of a file that is unpacked, and of a line of it."""
LARGEST_SLOT, LARGEST_MS = 9_999, 1e9
COLUMNS = "values of columns that the job does not name"
"""As what is left out is counted."""

Value = bool | int | float | str | list[float] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One request, as a server has observed it."""

    request_id: str
    key_slot: int | None
    """0 to 9,999, of who asked; None where nobody said."""
    at: datetime
    """By the server's clock, UTC."""
    release: str
    generation: int
    rollout: str
    arm: str
    """live, candidate or shadow."""
    latency_ms: float | None
    error: str
    """The class's name; empty for an answer."""
    fell_back: bool
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Label:
    """What has turned out to be true of a request."""

    request_id: str
    at: datetime
    name: str
    value: bool | int | float | str


class UnreadableError(Exception):
    """A file that is not what an observer writes; the message says how."""


def documents(body: bytes, kind: str, *, labels: bool, columns: Mapping[str, Collection[str]]) -> Iterator[Any]:
    """The rows of a file, of which nothing is known yet; None for a line that is no JSON.

    Args:
        body: the file.
        kind: `parquet`, or anything else for lines of JSON in gzip.
        labels: whether it has labels, and no rows.
        columns: of `inputs` and `outputs`, those that are read; lines of JSON have all.

    Raises:
        UnreadableError: it is no such file, or longer than an observer writes.
    """
    return _parquet(body, labels, columns) if kind == "parquet" else _lines(body)


def _lines(body: bytes) -> Iterator[Any]:
    unpacking = zlib.decompressobj(wbits=31)
    try:
        text = unpacking.decompress(body, TEXT_BYTES + 1)
    except zlib.error as error:
        raise UnreadableError(f"expected gzip, got: {error}") from None
    if len(text) > TEXT_BYTES or unpacking.unconsumed_tail:
        raise UnreadableError(f"expected at most {TEXT_BYTES:,} bytes unpacked, got more")
    if not unpacking.eof:
        raise UnreadableError("expected gzip to its end, got part of it: torn")
    for number, line in enumerate(io.BytesIO(text), 1):
        if number > ROWS:
            raise UnreadableError(f"expected at most {ROWS:,} rows, got more")
        try:
            yield json.loads(line) if len(line) <= LINE_BYTES else None
        except (ValueError, RecursionError):
            yield None


def _parquet(body: bytes, labels: bool, columns: Mapping[str, Collection[str]]) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    fixed = {**LABEL, "value": ""} if labels else ROW
    wanted = [*fixed, *(f"{side}.{name}" for side in SIDES for name in columns.get(side, ()) if not labels)]
    try:
        options = {"thrift_string_size_limit": 2**20, "thrift_container_size_limit": 100_000}
        types = parquet.ParquetFile(io.BytesIO(body), **options).schema_arrow
        there = [name for name in wanted if name in types.names]
        if strange := [name for name in there if not _is_plain(types.field(name).type)]:
            raise UnreadableError(f"expected numbers, texts and vectors, got {types.field(strange[0]).type}"[:300])
        # As a table of the different ones: a text that stands in all rows is there once.
        texts = [name for name in there if types.field(name).type == pyarrow.string()]
        file = parquet.ParquetFile(io.BytesIO(body), read_dictionary=texts, **options)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        values = max(
            (group.column(place).num_values for group in groups for place in range(group.num_columns)), default=0
        )
        size = sum(group.total_byte_size for group in groups)
        if file.metadata.num_rows > ROWS or size > TEXT_BYTES or values > ROWS * LONGEST_VECTOR:
            raise UnreadableError(
                f"expected at most {ROWS:,} rows of {TEXT_BYTES:,} bytes, got {file.metadata.num_rows:,} of {size:,}"
            )
        table = file.read(columns=there, use_threads=False)
        found = {name: _cells(table.column(name)) for name in there}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise UnreadableError(f"expected Parquet, got {type(error).__name__}: {error}"[:300]) from None
    for index in range(table.num_rows):
        row: dict[str, Any] = {name: found[name][index] for name in there if name in fixed}
        for side in () if labels else SIDES:
            # A column that this request did not have is null in Parquet.
            row[side] = {
                name.partition(".")[2]: found[name][index]
                for name in there
                if name.startswith(f"{side}.") and found[name][index] is not None
            }
        yield row


def _is_plain(kind: Any) -> bool:
    """Whether it is a type that an observer writes."""
    from pyarrow import types

    if types.is_list(kind):
        return (
            not types.is_string(kind.value_type) and not types.is_list(kind.value_type) and _is_plain(kind.value_type)
        )
    tests = (types.is_string, types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(test(kind) for test in tests)


def _cells(column: Any) -> list[Any]:
    """Of a column of texts by number: each text is made once."""
    cells: list[Any] = []
    for chunk in column.chunks:
        if not hasattr(chunk, "dictionary"):
            cells += chunk.to_pylist()
            continue
        texts = [text[:LONGEST_TEXT] if isinstance(text, str) else None for text in chunk.dictionary.to_pylist()]
        cells += [texts[place] if place is not None else None for place in chunk.indices.to_pylist()]
    return cells


# ---- one row


def row_of(document: Any, columns: Mapping[str, Collection[str]], left_out: Counter[str]) -> Row | None:
    """None for what is malformed; values of other columns are counted in `left_out`."""
    if not isinstance(document, dict) or (at := _time(document.get("time"))) is None:
        return None
    latency, slot = document.get("latency_ms"), document.get("key_slot")
    texts = [document.get(name) for name in ("request_id", "release", "rollout", "error")]
    if not all(isinstance(text, str) and len(text) <= LONGEST_ID for text in texts) or not texts[0]:
        return None
    request_id, release, rollout, error = (str(text) for text in texts)
    generation, fell_back, arm = (document.get(name) for name in ("generation", "fell_back", "arm"))
    if (
        (release and not RELEASE_ID.fullmatch(release))
        or type(generation) is not int
        or not 0 <= generation <= MOST_MOVES
        or type(fell_back) is not bool
        or arm not in (LIVE, CANDIDATE, SHADOW)
        or not (slot is None or (type(slot) is int and 0 <= slot <= LARGEST_SLOT))
        or not (latency is None or (type(latency) in (int, float) and 0 <= latency <= LARGEST_MS))
    ):
        return None
    sides = []
    for side in SIDES:
        given = document.get(side, {})
        if not isinstance(given, dict) or len(given) > MOST_COLUMNS:
            return None
        kept = {name: value for name, value in given.items() if name in columns.get(side, ())}
        left_out[COLUMNS] += len(given) - len(kept)
        if not all(map(_is_value, kept.values())):
            return None
        sides.append(kept)
    return Row(
        request_id, slot, at, release, generation, rollout, arm, None if latency is None else float(latency), error,
        fell_back, *sides,
    )  # fmt: skip


def label_of(document: Any) -> Label | None:
    """None for what is malformed."""
    if not isinstance(document, dict) or (at := _time(document.get("time"))) is None:
        return None
    request_id, name, value = (document.get(key) for key in ("request_id", "name", "value"))
    texts = [isinstance(text, str) and 0 < len(text) <= LONGEST_ID for text in (request_id, name)]
    if not all(texts) or value is None or isinstance(value, list) or not _is_value(value):
        return None
    return Label(str(request_id), at, str(name), value)


def _time(text: Any) -> datetime | None:
    if not isinstance(text, str) or len(text) > 40:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at.tzinfo is not None else None


def _is_value(value: Any) -> bool:
    if value is None or type(value) is bool:
        return True
    if isinstance(value, list):
        return len(value) <= LONGEST_VECTOR and all(one is None or _is_number(one) for one in value)
    return len(value) <= LONGEST_TEXT if isinstance(value, str) else _is_number(value)


def _is_number(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is bool or (type(value) is int and abs(value) < 2**63)

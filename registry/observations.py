"""What servers have observed, read from the bucket with suspicion: for whoever watches a release, and for operators.

    found = read_new(store, "digits", cursor, columns={"inputs": ["age"]}, live_since={release: when})
    for row in found.rows: ...
    labelled(found.rows, found.labels)      # pairs of a row and what has turned out to be true of it

Whoever may write observations is a server, and says what it likes: what is not as `shipreader/observation_files.py` has
it, is too long, comes from the future or from before its release is left out and counted.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from shipreader.observation_files import (
    CANDIDATE,
    FILE_BYTES,
    FILE_NAME,
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
    observations_prefix,
)
from shipreader.records import MOST_MOVES, RELEASE_ID
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ListedObject, ObjectStore
from train_and_ship.registry.identity import require_name

OVERLAP = timedelta(minutes=15)
"""Of what a cursor has passed, so much is looked at again: stores show things in another order than they date them."""
LOOKBACK = timedelta(hours=6)
"""How late a file may come, by the hour in its name. Later ones are not looked for."""
AHEAD, BEHIND = timedelta(minutes=5), timedelta(minutes=5)
"""Clocks of servers may be so wrong before a row is from the future, or from before its release went live."""
MOST_ROWS = 200_000
"""Of one call, about: the next one goes on."""
TEXT_BYTES, LINE_BYTES = 64 * 2**20, 2**19
"""Of a file that is unpacked, and of a line of it."""
LARGEST_SLOT, LARGEST_MS = 9_999, 1e9
MOST_SAID = 20
"""Files that cannot be read, with their reasons; further ones are counted."""
FUTURE, EARLY, MALFORMED, REPEATED, FILES, COLUMNS = (
    "from the future", "from before their release", "malformed", "repeated", "files that cannot be read",
    "values of columns that the job does not name",
)  # fmt: skip
"""What is left out, as `Found.left_out` counts it."""

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


@dataclass(frozen=True)
class Cursor:
    """What was read already. Small, and plain JSON by `document`."""

    until: datetime | None = None
    """Everything that the store dated before this was read."""
    seen: frozenset[str] = frozenset()
    """Hashes of what was read and is not older than OVERLAP before `until`."""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"until": self.until.isoformat() if self.until is not None else None, "seen": sorted(self.seen)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Cursor:
        """What `document` gave. Raises ValueError, TypeError or KeyError for anything else."""
        until = document["until"]
        return cls(datetime.fromisoformat(until) if until is not None else None, frozenset(map(str, document["seen"])))


@dataclass
class Found:
    """What is new."""

    rows: list[Row] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    cursor: Cursor = Cursor()
    """For the next call."""
    more: bool = False
    """Whether there is more already."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason to number."""
    said: list[str] = field(default_factory=list)
    """Files that cannot be read, and why, for people."""


def read_new(
    store: ObjectStore,
    model: str,
    cursor: Cursor = Cursor(),
    *,
    columns: Mapping[str, Collection[str]] | None = None,
    live_since: Mapping[str, datetime] | None = None,
    lookback: timedelta = LOOKBACK,
    most_rows: int = MOST_ROWS,
) -> Found:
    """Rows and labels that were written since the cursor, each once. Reads only.

    Args:
        store: the bucket.
        model: whose requests they are.
        cursor: of the last call; without it everything within `lookback` is new.
        columns: of `inputs` and `outputs`, what the live release's job names; values of others are left out.
        live_since: when releases went live (or their rollout began); None where that is not asked.
        lookback: how late files may come.
        most_rows: after so many the rest is left to the next call.

    Raises:
        ServiceError: the store does not answer. The cursor that was given is still good.
    """
    now = store.now()
    begin = (now if cursor.until is None else min(now, cursor.until)) - lookback
    found = Found(cursor=cursor)
    listed = _listed(store, model, begin, now + AHEAD)
    fresh = _fresh(listed, cursor)
    known: set[tuple[str, str, datetime]] = set()
    for index, (key, item) in enumerate(fresh):
        if len(found.rows) + len(found.labels) >= most_rows:
            found.more = True
            fresh = fresh[:index]
            break
        _read(store, model, key, item, found, columns or {}, live_since, now, known)
    if fresh:
        until = max(fresh[-1][1].modified, cursor.until or fresh[-1][1].modified)
        read = cursor.seen | {_digest(key) for key, _ in fresh}
        # For as long as it would be taken for new otherwise.
        near = {_digest(key) for key, item in listed.items() if item.modified >= until - OVERLAP}
        found.cursor = Cursor(until, frozenset(read & near))
    return found


def read_between(
    store: ObjectStore,
    model: str,
    begin: datetime,
    end: datetime,
    *,
    columns: Mapping[str, Collection[str]] | None = None,
    most_rows: int = MOST_ROWS,
) -> Found:
    """Rows and labels of files whose first row lies between two times, by the hour; for labels that came later.

    Args:
        store: the bucket.
        model: whose requests they are.
        begin: UTC.
        end: UTC.
        columns: as `read_new`.
        most_rows: after so many the rest is left out, and `more` says so.

    Raises:
        ServiceError: the store does not answer.
    """
    found, known, now = Found(), set[tuple[str, str, datetime]](), store.now()
    for key, item in _listed(store, model, begin, end).items():
        if len(found.rows) + len(found.labels) >= most_rows:
            found.more = True
            break
        _read(store, model, key, item, found, columns or {}, None, now, known)
    return found


def labelled(rows: Iterable[Row], labels: Iterable[Label], name: str = "label") -> Iterator[tuple[Row, Label]]:
    """Rows with the newest label of their request. name: of the labels; others are not looked at."""
    newest: dict[str, Label] = {}
    for label in labels:
        if label.name == name and (label.request_id not in newest or newest[label.request_id].at <= label.at):
            newest[label.request_id] = label
    for row in rows:
        if (known := newest.get(row.request_id)) is not None:
            yield row, known


# ---- which files


def _listed(store: ObjectStore, model: str, begin: datetime, end: datetime) -> dict[str, ListedObject]:
    """Files of rows and of labels whose hour lies in between, by key."""
    prefix = observations_prefix(require_name("model", model))
    found: dict[str, ListedObject] = {}
    day = begin.astimezone(UTC).date()
    while day <= end.astimezone(UTC).date():
        first = begin.astimezone(UTC).hour if day == begin.astimezone(UTC).date() else 0
        for kind in ("", "labels-"):
            folder = f"{prefix}{day}/{kind}"
            for key, item in store.list_objects(folder, after=f"{folder}{first:02}", until=f"{folder}3").items():
                name = FILE_NAME.fullmatch(key.removeprefix(prefix))
                if name is not None and _within(name, begin, end):
                    found[key] = item
        day += timedelta(days=1)
    return found


def _within(name: Any, begin: datetime, end: datetime) -> bool:
    try:
        hour = datetime.fromisoformat(f"{name['date']}T{name['hour']}:00:00+00:00")
    except ValueError:
        # The 31st of February.
        return False
    return begin - timedelta(hours=1) < hour <= end


def _fresh(listed: Mapping[str, ListedObject], cursor: Cursor) -> list[tuple[str, ListedObject]]:
    """What was not read yet, in the order in which the store dates it."""
    found = [
        (key, item)
        for key, item in listed.items()
        if cursor.until is None or (item.modified >= cursor.until - OVERLAP and _digest(key) not in cursor.seen)
    ]
    return sorted(found, key=lambda pair: (pair[1].modified, pair[0]))


def _digest(key: str) -> str:
    return key.rpartition("/")[2].rpartition("-")[2].partition(".")[0]


# ---- what they hold


def _read(
    store: ObjectStore,
    model: str,
    key: str,
    listed: ListedObject,
    found: Found,
    columns: Mapping[str, Collection[str]],
    live_since: Mapping[str, datetime] | None,
    now: datetime,
    known: set[tuple[str, str, datetime]],
) -> None:
    """Add what one file says.

    Args:
        store: the bucket.
        model: whose file it is.
        key: of the file.
        listed: as the store has it.
        found: what is added to.
        columns: as `read_new`.
        live_since: as `read_new`.
        now: by the store's clock.
        known: request, arm and time of the rows that are there already.
    """
    name = FILE_NAME.fullmatch(key.removeprefix(observations_prefix(model)))
    assert name is not None
    labels = bool(name["labels"])
    try:
        body = _body(store, key, listed, name["sha256"])
        lines = _parquet(body, labels, columns) if name["kind"] == "parquet" else _lines(body)
        for document in lines:
            row = _label(document) if labels else _row(document, columns, found.left_out)
            if row is None:
                found.left_out[MALFORMED] += 1
            elif row.at > now + AHEAD:
                found.left_out[FUTURE] += 1
            elif isinstance(row, Label):
                found.labels.append(row)
            elif live_since is not None and row.at < live_since.get(row.release, row.at) - BEHIND:
                found.left_out[EARLY] += 1
            elif (identity := (row.request_id, row.arm, row.at)) in known:
                found.left_out[REPEATED] += 1
            else:
                known.add(identity)
                found.rows.append(row)
    except _UnreadableError as error:
        found.left_out[FILES] += 1
        if len(found.said) < MOST_SAID:
            found.said.append(f"{key}: {error}")


class _UnreadableError(Exception):
    """A file that is not what an observer writes; the message says how."""


def _body(store: ObjectStore, key: str, listed: ListedObject, sha256: str) -> bytes:
    if listed.bytes > FILE_BYTES:
        raise _UnreadableError(f"expected at most {FILE_BYTES:,} bytes, got {listed.bytes:,}")
    try:
        body = store.get(key, FILE_BYTES)
    except ReleaseError as error:
        raise _UnreadableError(str(error)) from None
    if body is None:
        raise _UnreadableError("it is gone: deleted meanwhile")
    if (got := hashlib.sha256(body[0]).hexdigest()[: len(sha256)]) != sha256:
        raise _UnreadableError(f"expected SHA-256 {sha256}… as its name says, got {got}…: torn or altered")
    return body[0]


def _lines(body: bytes) -> Iterator[Any]:
    unpacking = zlib.decompressobj(wbits=31)
    try:
        text = unpacking.decompress(body, TEXT_BYTES + 1)
    except zlib.error as error:
        raise _UnreadableError(f"expected gzip, got: {error}") from None
    if len(text) > TEXT_BYTES or unpacking.unconsumed_tail:
        raise _UnreadableError(f"expected at most {TEXT_BYTES:,} bytes unpacked, got more")
    if not unpacking.eof:
        raise _UnreadableError("expected gzip to its end, got part of it: torn")
    for number, line in enumerate(io.BytesIO(text), 1):
        if number > ROWS:
            raise _UnreadableError(f"expected at most {ROWS:,} rows, got more")
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
            raise _UnreadableError(f"expected numbers, texts and vectors, got {types.field(strange[0]).type}"[:300])
        # As a table of the different ones: a text that stands in all rows is there once.
        texts = [name for name in there if types.field(name).type == pyarrow.string()]
        file = parquet.ParquetFile(io.BytesIO(body), read_dictionary=texts, **options)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        values = max(
            (group.column(place).num_values for group in groups for place in range(group.num_columns)), default=0
        )
        size = sum(group.total_byte_size for group in groups)
        if file.metadata.num_rows > ROWS or size > TEXT_BYTES or values > ROWS * LONGEST_VECTOR:
            raise _UnreadableError(
                f"expected at most {ROWS:,} rows of {TEXT_BYTES:,} bytes, got {file.metadata.num_rows:,} of {size:,}"
            )
        table = file.read(columns=there, use_threads=False)
        found = {name: _cells(table.column(name)) for name in there}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise _UnreadableError(f"expected Parquet, got {type(error).__name__}: {error}"[:300]) from None
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


def _row(document: Any, columns: Mapping[str, Collection[str]], left_out: Counter[str]) -> Row | None:
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


def _label(document: Any) -> Label | None:
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

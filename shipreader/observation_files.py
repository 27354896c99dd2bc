"""What a file of observations is called and holds: one row a request, or one a label that came later.

observations/<model>/<YYYY-MM-DD>/<HH>-<writer>-<sha256>.jsonl.gz or .parquet           rows
observations/<model>/<YYYY-MM-DD>/labels-<HH>-<writer>-<sha256>.jsonl.gz or .parquet    labels

Date and hour (UTC) are those of the first row, the writer is 8 hexadecimal digits of one process, and the hash is of
the file's bytes: the same rows have the same name, and what is torn has not its own.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shipreader.errors import ReaderError
from shipreader.records import NAME

FILE_NAME = re.compile(
    r"(?P<date>\d{4}-\d{2}-\d{2})/(?P<labels>labels-)?(?P<hour>[01]\d|2[0-3])-(?P<writer>[0-9a-f]{8})-"
    r"(?P<sha256>[0-9a-f]{16})\.(?P<kind>jsonl\.gz|parquet)"
)
"""Below `observations_prefix`."""
FILE_BYTES, ROWS = 32 * 2**20, 20_000
"""Of one file, at most."""
LONGEST_ID, LONGEST_TEXT, LONGEST_VECTOR, MOST_COLUMNS = 128, 512, 64, 100
"""Characters of an id, and of a text; numbers of a vector; columns that are kept of inputs, and of outputs."""
LIVE, CANDIDATE, SHADOW = "live", "candidate", "shadow"
"""Whose answer it is: the release that is live, one that is tried, or one that is tried and whose answer nobody got."""
ROW = {
    "request_id": "string", "key_slot": "int32", "time": "string", "release": "string", "generation": "int64",
    "rollout": "string", "arm": "string", "latency_ms": "float64", "error": "string", "fell_back": "bool",
}  # fmt: skip
"""Of a row beside `inputs` and `outputs`, with pyarrow's types: `key_slot` is 0 to 9,999, null without a key;
`time` UTC, ISO 8601; `error` the class's name, empty for none."""
LABEL = {"request_id": "string", "time": "string", "name": "string"}
"""Of a label beside its `value`."""
SIDES = ("inputs", "outputs")
"""Objects of a line of JSON; in Parquet a column for each of their names: `inputs.age`."""


def observations_prefix(model: str) -> str:
    """With the slash at its end. Raises ReaderError for a name that cannot be part of a key."""
    if not NAME.fullmatch(model):
        raise ReaderError(f"model name: expected lower-case letters, digits, dots, dashes, _; got {model!r}")
    return f"observations/{model}/"


def has_pyarrow() -> bool:
    """Whether rows can be written as Parquet; it is not imported for the answer."""
    return importlib.util.find_spec("pyarrow") is not None


def encode(rows: Sequence[Mapping[str, Any]], writer: str, *, labels: bool, parquet: bool) -> tuple[str, bytes]:
    """A file's name below the prefix, and its bytes.

    Args:
        rows: at most `ROWS`, as `ROW` with `inputs` and `outputs`, or as `LABEL` with `value`.
        writer: 8 hexadecimal digits.
        labels: whether they are labels.
        parquet: as Parquet, unless a column has values of several types: lines of JSON take all.
    """
    body = _parquet(rows, LABEL if labels else ROW) if parquet else None
    kind = "parquet" if body is not None else "jsonl.gz"
    body = body if body is not None else _lines(rows)
    date, _, time = rows[0]["time"].partition("T")
    sha256 = hashlib.sha256(body).hexdigest()[:16]
    return f"{date}/{'labels-' if labels else ''}{time[:2]}-{writer}-{sha256}.{kind}", body


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
    # Half of a surrogate pair is no text.
    text = "".join(f"{dumps(row)}\n" for row in rows).encode(errors="replace")
    # Without a time: the same rows are the same bytes.
    return gzip.compress(text, 4, mtime=0)


def _parquet(rows: Sequence[Mapping[str, Any]], fixed: Mapping[str, str]) -> bytes | None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        name: pyarrow.array([row[name] for row in rows], pyarrow.type_for_alias(type)) for name, type in fixed.items()
    }
    try:
        if fixed is LABEL:
            columns["value"] = pyarrow.array([row["value"] for row in rows])
        for side in SIDES if fixed is ROW else ():
            for name in dict.fromkeys(name for row in rows for name in row[side]):
                columns[f"{side}.{name}"] = pyarrow.array([row[side].get(name) for row in rows])
    except (pyarrow.ArrowException, UnicodeError):
        return None
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, compression="zstd")
    return file.getvalue()

"""What servers have observed, read from the bucket with suspicion: for whoever watches a release, and for operators.

    found = read_new(store, "digits", cursor, columns={"inputs": ["age"]}, live_since={release: when})
    for row in found.rows: ...
    labelled(found.rows, found.labels)      # pairs of a row and what has turned out to be true of it

Whoever may write observations is a server, and says what it likes: what is not as `shipreader/observation_files.py` has
it, is too long, comes from the future or from before its release is left out and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from shipreader.observation_files import FILE_BYTES, FILE_NAME, observations_prefix
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ListedObject, ObjectStore
from train_and_ship.registry.identity import require_name
from train_and_ship.registry.observations.rows import Label, Row, UnreadableError, documents, label_of, row_of

OVERLAP = timedelta(minutes=15)
"""Of what a cursor has passed, so much is looked at again: stores show things in another order than they date them."""
LOOKBACK = timedelta(hours=6)
"""How late a file may come, by the hour in its name. Later ones are not looked for."""
AHEAD, BEHIND = timedelta(minutes=5), timedelta(minutes=5)
"""Clocks of servers may be so wrong before a row is from the future, or from before its release went live."""
MOST_ROWS = 200_000
"""Of one call, about: the next one goes on."""
MOST_SAID = 20
"""Files that cannot be read, with their reasons; further ones are counted."""
FUTURE, EARLY, MALFORMED, REPEATED, FILES = (
    "from the future", "from before their release", "malformed", "repeated", "files that cannot be read",
)  # fmt: skip
"""What is left out, as `Found.left_out` counts it."""


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
        for document in documents(body, name["kind"], labels=labels, columns=columns):
            row = label_of(document) if labels else row_of(document, columns, found.left_out)
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
    except UnreadableError as error:
        found.left_out[FILES] += 1
        if len(found.said) < MOST_SAID:
            found.said.append(f"{key}: {error}")


def _body(store: ObjectStore, key: str, listed: ListedObject, sha256: str) -> bytes:
    if listed.bytes > FILE_BYTES:
        raise UnreadableError(f"expected at most {FILE_BYTES:,} bytes, got {listed.bytes:,}")
    try:
        body = store.get(key, FILE_BYTES)
    except ReleaseError as error:
        raise UnreadableError(str(error)) from None
    if body is None:
        raise UnreadableError("it is gone: deleted meanwhile")
    if (got := hashlib.sha256(body[0]).hexdigest()[: len(sha256)]) != sha256:
        raise UnreadableError(f"expected SHA-256 {sha256}… as its name says, got {got}…: torn or altered")
    return body[0]

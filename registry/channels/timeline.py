"""What the history of a channel answers: what was live when, and what a rollback goes back to. No store, no network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from train_and_ship.infra.errors import RequestError
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer

_ZONE = re.compile(r"(?P<time>.*\d)\s+(?P<zone>[A-Za-z][A-Za-z0-9_+/-]*)")


def utc_now() -> str:
    """Now, by this machine's clock: UTC, ISO 8601 with milliseconds, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def moved_at(move: Pointer) -> datetime | None:
    """When a move took place, by its mover's clock; None for a record that was rebuilt without knowing."""
    return datetime.fromisoformat(move.moved_at) if move.moved_at else None


def live_at(history: Sequence[Pointer], when: datetime) -> Pointer | None:
    """The newest move of which is known that it is not after `when`; None before the first. history: oldest first."""
    done = [move for move in history if (time := moved_at(move)) is not None and time <= when]
    return done[-1] if done else None


def holes(history: Sequence[Pointer]) -> list[int]:
    """Generations that the history lacks, oldest first."""
    return sorted(set(range(1, history[-1].generation)) - {move.generation for move in history}) if history else []


def doubts(history: Sequence[Pointer], found: Pointer | None) -> list[int]:
    """Generations right after `found`, or the first ones, of which it is not known when they went live."""
    following = found.generation + 1 if found else 1
    timed = {move.generation for move in history if move.moved_at}
    unknown = []
    while history and following < history[-1].generation and following not in timed:
        unknown.append(following)
        following += 1
    return unknown


def disordered(history: Sequence[Pointer]) -> list[tuple[Pointer, Pointer]]:
    """Neighbours of which the later says an earlier time: the movers' clocks disagree."""
    timed = [move for move in history if move.moved_at]
    return [
        (earlier, later)
        for earlier, later in itertools.pairwise(timed)
        if datetime.fromisoformat(later.moved_at) < datetime.fromisoformat(earlier.moved_at)
    ]


def parse_time(text: str) -> datetime:
    """A point in time as people write it: ISO 8601, `2026-11-17 14:00`, with `+01:00`, `Z`, `UTC` or `Europe/Berlin`.

    Without a zone it is this machine's local time. Raises RequestError for anything else, for a time that has not come
    yet, and for one that the clocks' change skipped or had twice.
    """
    words = _ZONE.fullmatch(text.strip())
    try:
        time = datetime.fromisoformat(words["time"] if words else text.strip())
        if words and time.tzinfo is None:
            time = time.replace(tzinfo=ZoneInfo(words["zone"]))
        elif words:
            raise ValueError("two time zones")
    except (ValueError, ZoneInfoNotFoundError, OSError) as error:
        raise RequestError(
            f'time: expected such as "2026-11-17 14:00", with +01:00, UTC or Europe/Berlin behind it, got {text!r} '
            f"({error})"
        ) from None
    if time.astimezone(UTC) != time.replace(fold=1).astimezone(UTC):
        raise RequestError(
            f"time: {text!r} is skipped or comes twice, because the clocks change then; give it with an offset: +01:00"
        )
    time = time.astimezone()
    if time > datetime.now(UTC):
        raise RequestError(f"time: expected one that has passed, got {time.isoformat(sep=' ', timespec='seconds')}")
    return time


def rollback_target(live: Pointer, read: Callable[[int], Pointer]) -> Pointer | None:
    """The move that made live what a rollback goes back to; None when nothing else was live before.

    Rollbacks count as undoing: rolling back twice goes two releases back, never to the one that the first rollback
    fled from. read: the move of a generation; called for no more of them than needed.
    """
    return next((move for move in _moves_that_stand(live, read) if move.release != live.release), None)


def _moves_that_stand(move: Pointer | None, read: Callable[[int], Pointer]) -> Iterator[Pointer]:
    """The moves that no rollback has undone, the newest first, from `move` on."""

    def before(move: Pointer) -> Pointer | None:
        return read(move.generation - 1) if move.generation > 1 else None

    while move is not None:
        yield move
        while move.kind == ROLLBACK:
            # Undone is all that happened since this release went live before.
            release = move.release
            undone = next((older for older in _moves_that_stand(before(move), read) if older.release == release), None)
            if undone is None:
                break
            move = undone
        move = before(move)

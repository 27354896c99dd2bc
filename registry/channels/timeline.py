"""What the history of a channel answers: what was live when, and what a rollback goes back to. No store, no network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from train_and_ship.infra.errors import RequestError
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer
from train_and_ship.registry.identity import moment

MOST_NESTED = 100
"""Rollbacks in a row to releases that were never live before: nobody has made so many."""

_ZONE = re.compile(r"(?P<time>.*\d)\s+(?P<zone>[A-Za-z][A-Za-z0-9_+/-]*)")


def utc_now() -> str:
    """Now, by this machine's clock: UTC, ISO 8601 with milliseconds, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def moved_at(move: Pointer) -> datetime | None:
    """When a move took place, by its mover's clock; None for a record that was rebuilt without knowing."""
    return moment(move.moved_at) if move.moved_at else None


def live_at(history: Sequence[Pointer], when: datetime) -> Pointer | None:
    """The newest move of which is known that it is not after `when`; None before the first. history: oldest first."""
    done = [move for move in history if (time := moved_at(move)) is not None and time <= when]
    return done[-1] if done else None


def holes(history: Sequence[Pointer]) -> list[range]:
    """Generations that the history lacks, oldest first, neighbours together: a record may say any number."""
    known = [0, *(move.generation for move in history)]
    return [range(low + 1, high) for low, high in itertools.pairwise(known) if high - low > 1]


def doubts(history: Sequence[Pointer], found: Pointer | None) -> range:
    """Generations right after `found`, or the first ones, of which it is not known when they went live."""
    following = found.generation + 1 if found else 1
    if not history:
        return range(following, following)
    last = history[-1].generation
    timed = [move.generation for move in history if move.moved_at and move.generation >= following]
    return range(following, max(following, min([last, *timed])))


def numbers(generations: Iterable[range]) -> str:
    """Generations in words: `3, 5 to 7`."""
    return ", ".join(f"{one.start}" if len(one) == 1 else f"{one.start} to {one.stop - 1}" for one in generations)


def disordered(history: Sequence[Pointer]) -> list[tuple[Pointer, Pointer]]:
    """Neighbours of which the later says an earlier time: the movers' clocks disagree."""
    timed = [move for move in history if move.moved_at]
    return [
        (earlier, later)
        for earlier, later in itertools.pairwise(timed)
        if moment(later.moved_at) < moment(earlier.moved_at)
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
    fled from. read: the move of a generation; called for no more of them than needed, and once for each.

    Raises RequestError for records that contradict each other, and for a history that nobody could follow.
    """
    stack = _Stack(read)
    return next((move for move in stack.from_top(live) if move.release != live.release), None)


class _Stack:
    """The moves that no rollback has undone, each on the one that it stands on."""

    def __init__(self, read: Callable[[int], Pointer]) -> None:
        self._read = read
        self._moves: dict[int, Pointer] = {}
        self._below: dict[int, Pointer | None] = {}
        """By generation; without it each rollback would look through all that lies below the ones before it again."""

    def from_top(self, move: Pointer | None, depth: int = 0) -> Iterator[Pointer]:
        """From `move` on down."""
        while move is not None:
            yield move
            move = self._under(move, depth)

    def _under(self, top: Pointer, depth: int) -> Pointer | None:
        if top.generation not in self._below:
            if depth > MOST_NESTED:
                raise RequestError(
                    f"{top.model} {top.channel}: more than {MOST_NESTED} rollbacks to releases that were never live "
                    "follow each other in its history, so what was live before is not clear; name a release with --to"
                )
            move = top
            while move.kind == ROLLBACK:
                # Undone is all that happened since this release went live before.
                older = self.from_top(self._before(move), depth + 1)
                undone = next((one for one in older if one.release == top.release), None)
                if undone is None:
                    break
                move = undone
            self._below[top.generation] = self._before(move)
        return self._below[top.generation]

    def _before(self, move: Pointer) -> Pointer | None:
        generation = move.generation - 1
        if generation < 1:
            return None
        if generation not in self._moves:
            self._moves[generation] = self._read(generation)
        found = self._moves[generation]
        if move.previous is not None and found.release != move.previous:
            raise RequestError(
                f"{move.model} {move.channel}: generation {move.generation} replaced {move.previous}, but the record "
                f"of generation {generation} says that {found.release} was live then: one of them is not what was "
                f"written first. Name a release with --to; `ship doctor {move.model}` says more"
            )
        return found

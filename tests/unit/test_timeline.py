"""What a channel's history answers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from train_and_ship.infra.errors import RequestError
from train_and_ship.registry.channels.pointer import PROMOTION, ROLLBACK, Pointer
from train_and_ship.registry.channels.timeline import (
    disordered,
    doubts,
    holes,
    live_at,
    numbers,
    parse_time,
    rollback_target,
)

NOON = datetime(2026, 11, 17, 12, tzinfo=UTC)


def move(generation: int, release: str, kind: str = PROMOTION, moved_at: str | None = None) -> Pointer:
    return Pointer(
        model="digits",
        channel="prod",
        generation=generation,
        release=release,
        manifest_sha256="0" * 64,
        previous=None,
        nonce=f"{generation}",
        moved_at=(NOON + timedelta(hours=generation)).isoformat() if moved_at is None else moved_at,
        moved_by="ada",
        reason="",
        flow_run="",
        mlflow_version="",
        kind=kind,
    )


def history(moves: str) -> list[Pointer]:
    """`A B <A` : A and B promoted, then rolled back to A."""
    return [
        move(generation, word.strip("<"), ROLLBACK if word.startswith("<") else PROMOTION)
        for generation, word in enumerate(moves.split(), 1)
    ]


def target(moves: list[Pointer]) -> str | None:
    found = rollback_target(moves[-1], lambda generation: moves[generation - 1])
    return found.release if found else None


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("A", None),
        ("A B", "A"),
        ("A B C", "B"),
        # A second rollback does not go back to what the first one fled from.
        ("A B C <B", "A"),
        ("A B C <B <A", None),
        # Nor do later promotions bring it back.
        ("A B C <B D", "B"),
        ("A B C <B D <B", "A"),
        # A promotion of an old release is no rollback: below it lies what it replaced.
        ("A B A", "B"),
        # A rollback to a release that was never live here goes on top.
        ("A B <X", "B"),
        ("A A", None),
        ("A B B", "A"),
    ],
)
def test_a_rollback_goes_to_what_was_live_before_with_earlier_rollbacks_undone(
    moves: str, expected: str | None
) -> None:
    assert target(history(moves)) == expected


def test_a_rollback_of_any_history_takes_what_a_stack_of_promotions_has_below_its_top() -> None:
    generator = random.Random(0)
    for _ in range(300):
        words = [generator.choice(["", "<"]) + generator.choice("ABCDE") for _ in range(generator.randint(1, 14))]
        stack: list[str] = []
        for word in words:
            release = word.strip("<")
            if word.startswith("<") and release in stack:
                while stack[-1] != release:
                    stack.pop()
            else:
                stack.append(release)
        below = next((release for release in reversed(stack) if release != stack[-1]), None)
        assert target(history(" ".join(words))) == below, words


def test_a_rollback_reads_no_more_of_a_long_history_than_it_needs() -> None:
    moves = history("A B " * 500)
    asked: list[int] = []

    def read(generation: int) -> Pointer:
        asked.append(generation)
        return moves[generation - 1]

    assert rollback_target(moves[-1], read) == moves[-2]
    assert asked == [999]


def test_what_was_live_is_the_last_move_before_that_time() -> None:
    moves = history("A B C")
    assert live_at(moves, NOON) is None
    assert live_at(moves, NOON + timedelta(hours=1)) == moves[0]
    assert live_at(moves, NOON + timedelta(hours=2, minutes=59)) == moves[1]
    assert live_at(moves, NOON + timedelta(days=9)) == moves[2]
    assert live_at([], NOON) is None


def test_clocks_that_disagree_are_named_and_the_later_generation_counts() -> None:
    moves = [*history("A B"), move(3, "C", moved_at=(NOON + timedelta(minutes=90)).isoformat())]
    assert disordered(moves) == [(moves[1], moves[2])]
    assert live_at(moves, NOON + timedelta(hours=3)) == moves[2]


def test_a_move_of_unknown_time_is_a_doubt_and_no_answer() -> None:
    moves = [*history("A"), move(2, "B", moved_at=""), *history("A B C")[2:]]
    found = live_at(moves, NOON + timedelta(hours=1, minutes=30))
    assert found == moves[0]
    assert list(doubts(moves, found)) == [2]
    assert not doubts(moves, moves[2])
    assert holes([moves[0], moves[2]]) == [range(2, 3)]
    assert list(doubts([moves[2]], None)) == [1, 2]
    assert numbers([range(1, 3), range(5, 6)]) == "1 to 2, 5"


@pytest.fixture
def berlin() -> Iterator[None]:
    """This machine stands in Berlin."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2025-11-17 14:00", "2025-11-17 13:00"),
        ("2025-07-17 14:00", "2025-07-17 12:00"),
        ("2025-11-17T14:00:05Z", "2025-11-17 14:00:05"),
        ("2025-11-17 14:00 UTC", "2025-11-17 14:00"),
        ("2025-11-17 14:00+05:30", "2025-11-17 08:30"),
        ("2025-11-17 14:00 America/New_York", "2025-11-17 19:00"),
        ("2025-11-17", "2025-11-16 23:00"),
    ],
)
def test_a_time_without_a_zone_is_this_machines_own(berlin: None, text: str, utc: str) -> None:
    assert parse_time(text).astimezone(UTC) == datetime.fromisoformat(utc).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yesterday", "expected such as"),
        ("2025-13-17 14:00", "expected such as"),
        ("2025-11-17 14:00 Mars/Olympus", "expected such as"),
        ("2025-11-17 14:00+01:00 UTC", "expected such as"),
        ("2999-01-01", "has passed"),
        # The hour that comes twice in autumn, and the one that spring skips.
        ("2025-10-26 02:30", "comes twice"),
        ("2025-03-30 02:30", "comes twice"),
    ],
)
def test_a_time_that_is_none_is_refused(berlin: None, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_time(text)

"""Some nights of the month that `make month` lives through, with the same code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.month.history import mismatches, tell
from tests.support.month.month import Month
from tests.support.month.nights import nights
from tests.support.month.picture import picture, rows_of, table
from train_and_ship.infra.settings import Settings

SOME = (1, 2, 6, 16, 26)
"""The first, a quiet one, damaged data, a run killed in training, and MLflow dying before a promotion."""


# It trains and ships several times, and kills servers in between.
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_after_nights_on_which_things_broke_every_record_says_what_happened_and_nothing_is_half_done(
    stack: Settings, tmp_path: Path
) -> None:
    month = Month(stack, tmp_path)
    try:
        month.live_through([night for night in nights() if night.number in SOME])
        told = tell(month)
        assert mismatches(month, told) == []
    finally:
        month.close()
    rows = rows_of(month.lived, told, tmp_path)
    assert [row.decisions for row in rows] == [
        ("promoted",), ("skipped",), ("failed",), ("failed", "promoted"), ("promoted",)
    ]  # fmt: skip
    assert table(rows).count("\n") == len(SOME) + 1 and picture(rows).count("<circle") == 3

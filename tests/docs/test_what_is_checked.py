"""The page about what is checked says what the code says."""

from __future__ import annotations

import pytest

from tests.support.projects import REPOSITORY
from tests.support.what_is_checked import ROWS, Row, page, words


@pytest.mark.parametrize("row", ROWS, ids=[row.situation for row in ROWS])
def test_the_words_of_a_row_stand_in_the_file_that_says_them(row: Row) -> None:
    assert row.says in words(row.file)


def test_the_page_is_the_table() -> None:
    assert (REPOSITORY / "docs" / "what-is-checked.md").read_text() == page(), (
        "write it anew: python -m tests.support.what_is_checked > docs/what-is-checked.md"
    )

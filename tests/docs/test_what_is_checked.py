"""The page about what is checked is made of the table by which the code says it."""

from __future__ import annotations

import pytest

from tests.support.import_graph import files_of
from tests.support.projects import REPOSITORY
from tests.support.what_is_checked import page
from torchworker import situations
from torchworker.situations import Situation

NAMES = {name: value for name, value in vars(situations).items() if isinstance(value, Situation)}
CODE = {file: path.read_text() for file, path in files_of().items() if not file.endswith("/situations.py")}


@pytest.mark.parametrize("name", [name for name, situation in NAMES.items() if situation.says])
def test_a_situation_has_its_words_from_the_table(name: str) -> None:
    assert len([file for file, text in CODE.items() if f"situations.{name}" in text]) == 1


def test_the_page_is_the_table() -> None:
    assert (REPOSITORY / "docs" / "what-is-checked.md").read_text() == page(), (
        "write it anew: python -m tests.support.what_is_checked > docs/what-is-checked.md"
    )

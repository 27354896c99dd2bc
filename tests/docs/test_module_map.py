"""docs/modules.md, the map of the house, is current and says something about every file."""

from __future__ import annotations

import pytest

from tests.support.import_graph import files_of
from tests.support.module_map import first_line, page
from tests.support.projects import REPOSITORY


def test_the_map_is_what_the_files_say_of_themselves() -> None:
    written = (REPOSITORY / "docs" / "modules.md").read_text()
    assert written == page(), "write it anew: python -m tests.support.module_map > docs/modules.md"


@pytest.mark.parametrize("file", files_of())
def test_the_first_line_of_a_file_is_a_whole_sentence(file: str) -> None:
    assert first_line(file).endswith((".", "?", ")")), first_line(file)

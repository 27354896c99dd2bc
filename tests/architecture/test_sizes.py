"""No file of the product is too long to be read at once."""

from __future__ import annotations

from pathlib import Path

from tests.support.code_lines import PRODUCT, count
from tests.support.projects import REPOSITORY

MOST = 400
"""Lines of code, without docstrings, comments and blank lines."""
MAY_BE_LONGER = {"torchworker/contract.py"}
"""One file on purpose: all that two processes say to each other."""


def test_no_file_of_the_product_is_longer_than_what_one_reads_at_once() -> None:
    found = count(Path(REPOSITORY / name) for name in PRODUCT)
    long = {path.relative_to(REPOSITORY).as_posix() for path, lines in found.items() if lines > MOST}
    assert long == MAY_BE_LONGER

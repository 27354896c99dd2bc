"""No model of the zoo is exported silently wrong, and docs/exports.md says what became of each.

`make test` asks one, which TorchScript cannot capture; `make soak` asks all.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.support.projects import REPOSITORY
from tests.support.zoo.animals import ZOO
from tests.support.zoo.export_page import EDGE, USUAL, Row, page, told, visit

SOME = "the same with torch.cond"
QUICK = tuple(kind for kind in USUAL if kind != "aoti")
PAGE = REPOSITORY / "docs" / "exports.md"


def _anywhere(reasons: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """Exact and within are one: which of the two it is depends on the processor's kernels. Nor do lines of torch's own
    files count, which differ from version to version."""
    reasons = {place: re.sub(r"^(exact|within)\b", "proven", reason) for place, reason in reasons.items()}
    return {place: re.sub(r"\b(?!zoo\b)(\w+\.py):\d+", r"\1", reason) for place, reason in reasons.items()}


def _is_as_written(rows: dict[str, Row], kinds: tuple[str, ...]) -> None:
    written = PAGE.read_text()
    cells, reasons = told(page(rows))
    written_cells, written_reasons = (
        # Without a C++ compiler there is no custom operator.
        {place: text for place, text in found.items() if place[0] in rows and place[1] in kinds}
        for found in told(written)
    )
    if f"was written on {torch.backends.cpu.get_cpu_capability()}." in written:
        assert cells == written_cells, "run: python -m tests.zoo > docs/exports.md"
    assert _anywhere(reasons) == _anywhere(written_reasons), "run: python -m tests.zoo > docs/exports.md"


def test_a_model_is_exported_faithfully_or_refused_as_the_page_says(tmp_path: Path) -> None:
    (some,) = [animal for animal in ZOO if animal.name == SOME]
    _is_as_written(visit(tmp_path, QUICK, [some]), QUICK)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_model_is_exported_faithfully_or_refused_as_the_page_says(tmp_path: Path) -> None:
    rows = visit(tmp_path, USUAL)
    if any("C++ compiler" in cell.how for row in rows.values() for cell in row.values()):
        # Compiled formats were not run; all others are as written.
        pytest.skip("no C++ compiler: AOTInductor and the custom operator were not run")
    _is_as_written(rows, USUAL)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_model_is_lowered_to_executorch_faithfully_or_refused_as_the_page_says(tmp_path: Path) -> None:
    if importlib.util.find_spec("executorch") is None:
        pytest.skip("ExecuTorch is not installed: pip install executorch==1.5.1")
    _is_as_written(visit(tmp_path, EDGE), EDGE)

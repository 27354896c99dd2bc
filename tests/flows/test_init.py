"""What `ship init` writes of a tidy project passes `ship check` as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fixture_types import Ship
from tests.support.projects import CODE


@pytest.mark.parametrize("layout", ["", "src/shop"])
def test_a_tidy_project_passes_the_check_at_once(ship: Ship, tmp_path: Path, layout: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    (tmp_path / layout / "plain.py").write_text(CODE)
    made = ship("init", str(tmp_path), "--name", "tidy")
    assert made.status == 0, made.text
    checked = ship("check", str(tmp_path / "job.yaml"), "--no-export")
    assert checked.status == 0 and "96 training, 96 validation" in checked.output, checked.text

"""The table of stages is what the stages are."""

from __future__ import annotations

import importlib
import subprocess
import sys
import typing

import pytest

from tests.support.projects import REPOSITORY
from torchworker.stage import STAGES


def test_every_module_of_the_stages_is_in_the_table() -> None:
    found = {path.stem for path in (REPOSITORY / "torchworker" / "stages").glob("*.py")} - {"__init__"}
    assert found == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_its_own_request_and_nothing_else(stage: str) -> None:
    function, request = STAGES[stage]
    hints = typing.get_type_hints(getattr(importlib.import_module(f"torchworker.stages.{stage}"), function))
    hints.pop("return")
    assert list(hints.values()) == [request]


def test_the_table_loads_no_stage() -> None:
    script = (
        "import sys, torchworker.stage; print([name for name in sys.modules if name.startswith('torchworker.stages')])"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"

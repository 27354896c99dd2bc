"""Seeded faults are whole statements, drawn alike every time, and taken out again."""

from __future__ import annotations

import ast
import random
from pathlib import Path

from tests.support.mutation import draw

CODE = '''
def limit(value, low=1, strict=True):
    """What it says."""
    if value < low:
        raise ValueError("too small")
    return max(value, low)
'''
KINDS = {"negated condition", "dropped raise", "swapped arguments", "swapped constant", "early return"}


def test_every_kind_is_drawn_and_leaves_a_program_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "limit.py"
    seen = set()
    for seed in range(60):
        path.write_text(CODE)
        fault = draw("limit.py", CODE, random.Random(seed))
        assert fault == draw("limit.py", CODE, random.Random(seed)) and fault is not None
        before = fault.put(tmp_path)
        assert before == CODE and path.read_text() != CODE
        ast.parse(path.read_text())
        seen.add(fault.kind)
    assert seen == KINDS


def test_a_module_without_statements_has_no_fault() -> None:
    assert draw("empty.py", '"""Nothing."""\n', random.Random(1)) is None

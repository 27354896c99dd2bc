"""Which release answers: the same slot for the same key in every process and language, as docs/serving.md says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import numpy as np
import pytest

from shipreader.split import LONGEST_KEY, SLOTS, slot_of
from tests.support.projects import REPOSITORY

PAGE = (REPOSITORY / "docs" / "serving.md").read_text()
VECTORS: list[tuple[str, Any, int]] = [
    (model, json.loads(key), int(slot))
    for model, keys, slot in re.findall(r"^\| `(\w+)` \| (`.*?) \| (\d+) \|$", PAGE, re.MULTILINE)
    for key in re.findall(r"`([^`]+)`", keys)
]


def test_the_slots_of_the_page_are_those_of_the_code() -> None:
    assert len(VECTORS) == 15
    assert {slot for _, _, slot in VECTORS} >= {0, 499, 500, SLOTS - 1}
    assert [(model, key, slot_of(model, key)) for model, key, _ in VECTORS] == VECTORS


def test_another_language_comes_to_the_same_slots() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (code,) = re.findall(r"```javascript\n(.*?)```", PAGE, re.DOTALL)
    # Also what is no key; of integers those that JavaScript has.
    asked = [[model, key] for model, key, _ in VECTORS if not isinstance(key, int) or abs(key) < 2**53]
    asked += [["digits", key] for key in (None, "", True, 1.5, [], "é" * 512, "é" * 513, "a" * 1025, "\ud800")]
    script = f"{code}\nconsole.log(JSON.stringify({json.dumps(asked)}.map(([model, key]) => slotOf(model, key))))"
    done = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [slot_of(model, key) for model, key in asked]
    assert json.loads(done.stdout)[-9:-3] == [None] * 5 + [slot_of("digits", "é" * 512)]


@pytest.mark.parametrize("key", [None, "", True, 1.5, b"ada", ["ada"], "\ud800", "a" * 1025, "é" * 513, 10**1024, 1e9])
def test_what_is_no_key_has_no_slot(key: object) -> None:
    assert slot_of("digits", key) is None


@pytest.mark.parametrize("key", ["a" * LONGEST_KEY, "é" * (LONGEST_KEY // 2), 10**1023, np.int64(42), "a\0b", " "])
def test_the_longest_keys_and_the_oddest_have_one(key: object) -> None:
    found = slot_of("digits", key)
    assert found is not None and 0 <= found < SLOTS
    assert slot_of("digits", np.int64(42)) == slot_of("digits", 42) == slot_of("digits", "42")


def test_each_share_gets_its_part_of_the_people() -> None:
    slots = [slot_of("digits", f"user-{number}") for number in range(20_000)]
    tenths = Counter(slot // 1000 for slot in slots if slot is not None)
    # Chi-squared of ten equal parts: above 27.9 once in a thousand sets of keys, and these are always the same.
    assert sum((tenths[part] - 2000) ** 2 / 2000 for part in range(10)) < 27.9
    assert 0.045 < sum(slot < 500 for slot in slots if slot is not None) / len(slots) < 0.055

"""Which tests stay together in one process when several run side by side."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support.projects import REPOSITORY

TABLE = REPOSITORY / "docs" / "testing.md"
MACHINE_WIDE = ("test_several_hosts.py", "test_slurm.py")
"""Tests that have a machine to themselves: network namespaces and daemons with names of their own."""
BY_TEST = ("services/test_chaos.py",)
"""Files in which every test takes minutes: their tests are asked side by side too."""
DIGITS = ("flows/test_digits.py", "flows/test_pulling.py", "docs/test_readme.py")
"""Tests that share one run of the digits example."""

EACH_STORE = re.compile(r"\[(ministack|rgw)\b")
"""In the id of a test that runs against both stores (`each_store_url`)."""


def longest_first() -> Callable[[pytest.Item], float]:
    """A key to sort tests by: files that took long when docs/testing.md was written come first."""
    rows = re.findall(r"^\| (\S+/test_\w+\.py) \| \d+ \| (\d+) \|", TABLE.read_text(), re.MULTILINE)
    seconds = {file: float(value) for file, value in rows}
    machine = sum(value for file, value in seconds.items() if file.endswith(MACHINE_WIDE))

    def key(item: pytest.Item) -> float:
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        return -(machine if file.endswith(MACHINE_WIDE) else seconds.get(file, 0.0))

    return key


def shuffled(seed: int) -> Callable[[pytest.Item], tuple[bytes, bytes]]:
    """A key to sort tests by: files in a drawn order, and their tests, unless these say that they are in order."""

    def drawn(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    def key(item: pytest.Item) -> tuple[bytes, bytes]:
        file = drawn(item.nodeid.partition("::")[0])
        return file, b"" if item.get_closest_marker("in_order") else drawn(item.nodeid)

    return key


class ByFile(LoadScopeScheduling):
    """Tests of a file share fixtures, so they stay together when others run beside them; on two stores, by store."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.endswith(DIGITS):
            return "digits"
        if file.endswith(MACHINE_WIDE):
            return "machine"
        if file.endswith(BY_TEST):
            return nodeid
        store = EACH_STORE.search(nodeid)
        return file + (store[0] if store else "")

"""The order in which tests are asked."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support import scheduling


class Item:
    """What the keys look at."""

    def __init__(self, nodeid: str, *marks: str) -> None:
        self.nodeid, self.marks = nodeid, marks

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks


def ids(items: list[Item]) -> list[str]:
    return [item.nodeid for item in items]


def test_files_that_took_long_come_first_and_those_of_one_machine_count_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "testing.md"
    rows = {"unit/test_long.py": 90, "distributed/test_slurm.py": 60, "distributed/test_several_hosts.py": 70}
    table.write_text("".join(f"| {file} | 3 | {seconds} | 5 |\n" for file, seconds in rows.items()))
    monkeypatch.setattr(scheduling, "TABLE", table)
    files = ("unit/test_new.py", "unit/test_long.py", "distributed/test_slurm.py", "distributed/test_several_hosts.py")
    items = [Item(f"tests/{file}::test_one") for file in files]
    items.sort(key=scheduling.longest_first())  # type: ignore[arg-type]
    assert [item.nodeid.rpartition("/")[2].partition(":")[0] for item in items] == [
        "test_slurm.py", "test_several_hosts.py", "test_long.py", "test_new.py",
    ]  # fmt: skip


def test_a_drawn_order_keeps_files_together_and_tests_in_order_that_say_so() -> None:
    files = ("a", "b", "c", "d")
    items = [
        Item(f"tests/test_{file}.py::test_{number}", *(["in_order"] if file == "b" else []))
        for file in files
        for number in range(9)
    ]
    orders = set()
    for seed in range(5):
        drawn = sorted(items, key=scheduling.shuffled(seed))  # type: ignore[arg-type]
        assert ids(drawn) == ids(sorted(items, key=scheduling.shuffled(seed)))  # type: ignore[arg-type]
        by_file = [nodeid.partition("::")[0] for nodeid in ids(drawn)]
        assert len([file for file, after in itertools.pairwise(by_file) if file != after]) == len(files) - 1
        assert [nodeid for nodeid in ids(drawn) if "test_b" in nodeid] == ids(items)[9:18]
        orders.add(tuple(ids(drawn)))
    assert len(orders) == 5

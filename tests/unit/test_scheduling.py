"""The order in which tests are asked."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

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


def test_soak_has_a_table_of_its_own_and_files_that_are_divided_count_by_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "testing.md"
    rows = {"services/test_chaos.py": 90, "unit/test_long.py": 80, "unit/test_short.py": 10}
    lines = "".join(f"| {file} | 3 | {seconds} |\n" for file, seconds in rows.items())
    table.write_text(f"| unit/test_short.py | 3 | 99 | 5 |\n{scheduling.SOAK_TABLE}\n{lines}")
    monkeypatch.setattr(scheduling, "TABLE", table)
    items = [Item(f"tests/{file}::test_one") for file in rows]
    soak = ids(sorted(items, key=scheduling.longest_first(soak=True)))  # type: ignore[arg-type]
    assert [name.rpartition("/")[2] for name in soak] == [
        "test_long.py::test_one", "test_chaos.py::test_one", "test_short.py::test_one",
    ]  # fmt: skip
    assert "test_short" in ids(sorted(items, key=scheduling.longest_first()))[0]  # type: ignore[arg-type]


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


class Node:
    """A testing process, as the scheduler sees it."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.given: list[int] = []
        self.shutting_down = False

    def shutdown(self) -> None:
        self.shutting_down = True

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices


def scheduled(tests: list[str], nodes: list[Node], marks: str, monkeypatch: pytest.MonkeyPatch) -> scheduling.ByFile:
    """A scheduler whose processes have nothing to do yet; of the files, those need a stack whose names say so."""
    monkeypatch.setattr(scheduling, "needs_stack", lambda file: "with_" in file)
    asked = scheduling.ByFile.__new__(scheduling.ByFile)
    asked.config = SimpleNamespace(option=SimpleNamespace(markexpr=marks))  # type: ignore[assignment]
    asked.log = lambda *_: None  # type: ignore[assignment]
    asked.numnodes, asked.assigned_work = len(nodes), {node: {} for node in nodes}  # type: ignore[misc]
    asked.workqueue = OrderedDict((test, {test: False}) for test in tests)
    asked.registered_collections = dict.fromkeys(nodes, tests)  # type: ignore[arg-type]
    return asked


@pytest.mark.parametrize(
    ("marks", "second", "rest"),
    [("not soak", "without", {"with"}), ("soak", "with", {"without"})],
)
def test_one_process_has_a_stack_and_two_in_soak_and_the_others_none_while_there_is_other_work(
    marks: str, second: str, rest: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = [f"tests/flows/test_{kind}_{number}.py::test" for number in range(2) for kind in ("with", "without")]
    nodes = [Node(number) for number in range(3)]
    asked = scheduled(tests, nodes, marks, monkeypatch)

    def next_of(node: Node) -> str:
        asked._assign_work_unit(node)  # type: ignore[arg-type]
        return tests[node.given[-1]].partition("_")[2].partition("_")[0]

    assert [next_of(node) for node in nodes] == ["with", second, "without"]
    # Then what is left.
    assert {next_of(nodes[1])} == rest
    assert not asked.workqueue


@pytest.mark.parametrize(("left", "starts"), [(17, False), (18, True)])
def test_a_second_stack_is_started_only_for_as_many_tests_as_it_is_worth(
    left: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scheduling.WORTH_A_STACK == 18 * scheduling.UNKNOWN_SECONDS
    nodes = [Node(0), Node(1)]
    asked = scheduled([f"tests/flows/test_with_{number}.py::test" for number in range(left)], nodes, "", monkeypatch)
    asked._reschedule(nodes[1])  # type: ignore[arg-type]
    assert (bool(nodes[1].given), nodes[1].shutting_down) == (starts, not starts)
    # Where it runs already, and where nobody else has one, the rest is asked too.
    for alone in (nodes[0], nodes[1]):
        asked._assign_work_unit(alone)  # type: ignore[arg-type]
        alone.given, alone.shutting_down = [], False
        asked._reschedule(alone)  # type: ignore[arg-type]
        assert alone.given and not alone.shutting_down


def test_a_file_needs_the_stack_whose_tests_ask_for_it_or_for_what_is_made_of_it() -> None:
    for file, needed in {
        "tests/flows/test_retrain.py": True,
        "tests/services/test_stack.py": False,
        "tests/services/test_mistakes.py": False,
        "tests/services/test_automations.py": True,
        "tests/docs/test_readme.py": True,
        "tests/exports/test_exports.py": False,
    }.items():
        assert scheduling.needs_stack(file) is needed, file

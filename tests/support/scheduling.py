"""Which tests stay together in one process when several run side by side, and which of the processes have a stack."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.support.projects import REPOSITORY

TABLE = REPOSITORY / "docs" / "testing.md"
SOAK_TABLE = "## Soak by file"
TOGETHER = {
    "one machine": ("distributed/test_several_hosts.py", "distributed/test_slurm.py"),
    "one run of digits": ("flows/test_digits.py", "flows/test_pulling.py", "docs/test_readme.py"),
    "one MLflow": tuple(
        f"services/test_{name}.py"
        for name in ("live_run", "mirror", "gc", "doctor", "mlflow_versions", "mlflow_behaviour")
    ),
}
"""Files that share what is slow to start, or of which a machine has one: network namespaces, daemons with a name."""
BY_TEST = ("services/test_chaos.py",)
"""Files in which every test takes minutes: their tests are asked side by side too."""
WITH_STACK = ("gw0",)
"""Testing processes that have a stack from the beginning on. Its start takes 25 CPU seconds, and its servers 5 % of a
core while nobody asks them; all of `make test` that needs one is asked within the time of the rest."""
WITH_STACK_IN_SOAK = ("gw0", "gw1")
WORTH_A_STACK = 90
"""Seconds of tests: another process starts a stack at the end only when so many are left for it."""
UNKNOWN_SECONDS = 5
"""Of tests that docs/testing.md does not list."""
_NEEDS_STACK = re.compile(r"\b(stack: Settings|command: Command|digits: Ended)\b")
_NEEDS_STACK_ELSEWHERE = re.compile(r"\b(ship: Ship|store: ObjectStore)\b")
"""Below tests/services, fixtures of these names mean servers of their own."""
EACH_STORE = re.compile(r"\[(ministack|rgw)\b")
"""In the id of a test that runs against both stores (`each_store_url`)."""


def longest_first(soak: bool = False) -> Callable[[pytest.Item], float]:
    """A key to sort tests by: files that took long when docs/testing.md was written come first.

    soak: whether `make soak` is asked for, which has a table of its own.
    """
    seconds = known_seconds(soak)

    def key(item: pytest.Item) -> float:
        return -seconds[_scope(item.nodeid.partition("::")[0].removeprefix("tests/"))]

    return key


def known_seconds(soak: bool) -> Counter[str]:
    """By file, or by what stays together: how long it took when docs/testing.md was written."""
    of_test, _, of_soak = TABLE.read_text().partition(SOAK_TABLE)
    rows = re.findall(r"^\| (\S+/test_\w+\.py) \| (\d+) \| (\d+) \|", of_soak if soak else of_test, re.MULTILINE)
    seconds: Counter[str] = Counter()
    for file, tests, value in rows:
        seconds[_scope(file)] += int(value) // (int(tests) if file in BY_TEST else 1)
    return seconds


def _scope(file: str) -> str:
    """file: named from tests/."""
    return next((scope for scope, files in TOGETHER.items() if file in files), file)


def shuffled(seed: int) -> Callable[[pytest.Item], tuple[bytes, bytes]]:
    """A key to sort tests by: files in a drawn order, and their tests, unless these say that they are in order."""

    def drawn(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    def key(item: pytest.Item) -> tuple[bytes, bytes]:
        file = drawn(item.nodeid.partition("::")[0])
        return file, b"" if item.get_closest_marker("in_order") else drawn(item.nodeid)

    return key


@functools.cache
def needs_stack(file: str) -> bool:
    """Whether tests of a file, named from the repository, ask for the stack of their process."""
    text = (REPOSITORY / file).read_text()
    return bool(_NEEDS_STACK.search(text) or ("tests/services/" not in file and _NEEDS_STACK_ELSEWHERE.search(text)))


class ByFile(LoadScopeScheduling):
    """Tests of a file share fixtures, so they stay together when others run beside them; on two stores, by store.

    A stack costs as much as many tests: one process takes what needs one first, the others what needs none while there
    is such work; what is left then and is less than a stack is worth waits for the one.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        with_stack = self._has_stack(node)
        for scope, tests in self.workqueue.items():
            if _any_needs_stack(tests) == with_stack:
                self.workqueue.move_to_end(scope, last=False)
                break
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        somebody_has_one = any(self._has_stack(other) and not other.shutting_down for other in self.nodes)
        if self.workqueue and not self._has_stack(node) and somebody_has_one and not self._is_worth(node):
            node.shutdown()
        else:
            super()._reschedule(node)

    def _has_stack(self, node: WorkerController) -> bool:
        return node.gateway.id in (WITH_STACK_IN_SOAK if self._is_soak() else WITH_STACK)

    def _is_soak(self) -> bool:
        return bool(self.config.option.markexpr == "soak")

    def _is_worth(self, node: WorkerController) -> bool:
        """Whether what is left needs no stack, or enough of it does that the process may start one."""
        if not all(_any_needs_stack(tests) for tests in self.workqueue.values()):
            return True
        began = any(_any_needs_stack(tests) for tests in self.assigned_work[node].values())
        seconds = known_seconds(self._is_soak())
        return began or sum(seconds[scope] or UNKNOWN_SECONDS for scope in self.workqueue) >= WORTH_A_STACK

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].removeprefix("tests/")
        if file in BY_TEST:
            return nodeid
        store = EACH_STORE.search(nodeid)
        return _scope(file) + (store[0] if store else "")


def _any_needs_stack(tests: Iterable[str]) -> bool:
    return any(needs_stack(test.partition("::")[0]) for test in tests)

"""Plugin of pytest: prints a table of test files by CPU time, as docs/testing.md holds it.

    make test ARGS="-p tests.support.cpu_by_file"

CPU time is user and system time of the testing process and of all that it has started, dead or alive: what a server of
the session does while nobody asks it counts for the tests that run meanwhile.
"""

from __future__ import annotations

import contextlib
import resource
from collections import defaultdict
from collections.abc import Iterator

import psutil
import pytest

NAME = "cpu_seconds"
BEGAN = pytest.StashKey[float]()
LONGEST = 30


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield
    if report.when == "teardown":
        report.user_properties.append((NAME, _cpu_seconds() - item.stash[BEGAN]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tests: dict[str, int] = defaultdict(int)
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                tests[file] += report.when == "call"
                wall[file] += report.duration
                cpu[file] += sum(value for name, value in report.user_properties if name == NAME)
    ordered = sorted(cpu, key=lambda file: -cpu[file])
    rows = [(file.removeprefix("tests/"), [file]) for file in ordered[:LONGEST]]
    rows += [(f"{len(ordered[LONGEST:])} others", ordered[LONGEST:]), ("all", ordered)]
    terminalreporter.write_line("| file | tests | seconds | CPU seconds |\n|---|---|---|---|")
    for name, files in rows:
        count, waited, used = (sum(of[file] for file in files) for of in (tests, wall, cpu))
        terminalreporter.write_line(f"| {name} | {count} | {waited:.0f} | {used:.0f} |")


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    ended = sum(one.ru_utime + one.ru_stime for one in used)
    alive = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            alive += sum(process.cpu_times()[:4])
    return ended + alive

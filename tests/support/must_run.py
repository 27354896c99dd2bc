"""Groups of tests that need what setting up the environment does not bring. In CI one that was skipped is a failure.

On a machine of one's own they are skipped and told before (telling.py). Where `CI` says so, or with `--must-run`, a run
fails that skipped one of them for want of its tool: a green CI that never asked is not green.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import pytest

GROUPS: dict[str, str] = {
    "slurm": r"no Slurm",
    "chromium": r"chromium",
    "executorch": r"executorch",
    "gcc": r"C\+\+",
    "rgw": r"Ceph RGW comes from|(fetch|unpack) .*(rados|ceph)",
    "hosts": r"network namespaces|command (ip|unshare)",
    "root": r"needs root",
    "npm": r"npm",
    "openssl": r"openssl",
    "postgresql": r"PostgreSQL",
    "packages": r"pip cannot",
    "nginx": r"nginx",
}
"""Name, as `.ci/run` writes it, to what the reason of a skipped test says where the tool is not to be had."""
ELSEWHERE = re.compile(r"Ceph RGW 16 is refused|Python below|has another way there|no IPv6|unconditional skip")
"""Reasons that are no want of a tool: the question is not to be asked here."""
ALL = "all"


def asked(option: str | None, environment: Iterable[tuple[str, str]] = tuple(os.environ.items())) -> frozenset[str]:
    """The groups that have to run.

    Args:
        option: what `--must-run` says: names with commas between them, `all`, or nothing; None where it is not given.
        environment: where `CI=1` or `CI=true` asks for all.

    Raises:
        pytest.UsageError: there is no such group.
    """
    if option is None:
        option = ALL if dict(environment).get("CI", "").lower() in ("1", "true") else ""
    if option == ALL:
        return frozenset(GROUPS)
    names = frozenset(name for name in option.replace(" ", "").split(",") if name)
    if unknown := names - GROUPS.keys():
        raise pytest.UsageError(f"--must-run: expected some of {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    return names


def group_of(reason: str) -> str | None:
    """Which group a skipped test is of, by its reason; empty where nobody knows, None where it is no want of a tool."""
    if ELSEWHERE.search(reason):
        return None
    return next((name for name, said in GROUPS.items() if re.search(said, reason, re.IGNORECASE)), "")


class MustRun:
    """A plugin of the process that reports: it fails the run for groups that were skipped."""

    def __init__(self, groups: frozenset[str]) -> None:
        self._groups = groups
        self._skipped: dict[str, tuple[int, str]] = {}
        """Group to how many tests, or files, were skipped, and why the first was."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # An expected failure is reported as skipped too.
        if report.skipped and not hasattr(report, "wasxfail"):
            self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._count(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.lines():
            terminalreporter.write_line(line, red=True)

    def lines(self) -> list[str]:
        """A line for each group that was skipped."""
        return [
            f"FAILED: {number} of group {name or '(none: name its tool in tests/support/must_run.py)'} had to run and "
            f"were skipped: {reason}"
            for name, (number, reason) in self._skipped.items()
        ]

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = " ".join(said.removeprefix("Skipped: ").split())[:300]
        group = group_of(reason)
        # What nobody has named may be anything.
        if group in self._groups or group == "":
            number, first = self._skipped.get(group, (0, reason))
            self._skipped[group] = (number + 1, first)

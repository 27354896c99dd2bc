"""The versions that are promised: which are asked, what they are asked, and docs/versions.md's table of the answers.

Needs nothing but Python, because it makes the environments that have the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PAGE = REPOSITORY / "docs" / "versions.md"

CORE = (
    "tests/architecture",
    "tests/unit",
    "tests/exports/test_cpp.py",
    "tests/exports/test_exports.py",
    "tests/exports/test_int8.py",
    "tests/exports/test_executorch.py",
    "tests/zoo/test_zoo.py::test_a_model_is_exported_faithfully_or_refused_as_the_page_says",
    "tests/distributed/test_resume.py",
    "tests/flows/test_digits.py",
    "tests/services/test_promotion.py",
    "tests/services/test_rollback.py",
    "tests/services/test_reader.py",
    "tests/services/test_mlflow_versions.py",
)
"""Whole behaviour in three minutes on two cores."""
CORE_OPTIONS = (
    # torchao's test is soak, and so is everything against Ceph, which is no version of ours.
    *("-m", "", "-k", "not rgw"),
    # Neither is Chromium; and the table is only written when the row has ended.
    *("--ignore", "tests/unit/test_report_in_a_browser.py", "--ignore", "tests/unit/test_matrix.py"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment to make, and to ask the core in."""

    name: str
    python: str
    torch: str
    """A requirement. Without a local version it is what a package installer takes by itself."""
    constraints: bool = True
    """The versions of constraints.txt, without torch's; else the newest that pyproject.toml allows."""


ROWS = (
    Row(name="3.11", python="3.11", torch="torch==2.13.0+cpu"),
    Row(name="3.12", python="3.12", torch="torch==2.13.0"),
    Row(name="3.13", python="3.13", torch="torch==2.13.0"),
    Row(name="3.14", python="3.14", torch="torch==2.13.0"),
    Row(name="3.15", python="3.15", torch="torch>=2.13,<2.15"),
    Row(name="torch-2.14", python="3.11", torch="torch==2.14.1"),
    Row(name="newest", python="3.12", torch="torch==2.13.0", constraints=False),
)
"""In the order of the table."""
EXTRAS = ("local", "examples", "dev", "edge")
"""What is installed of ours in each."""

SHOWN = ("torch", "prefect", "mlflow", "onnx", "onnxruntime")
"""Packages whose versions the table has."""
GO_WITH_TORCH = ("torchao", "executorch")
"""Packages that are made for one torch each."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a row."""

    date: str
    python: str = ""
    versions: dict[str, str] | None = None
    """By package, without those that are missing; None: there was no environment."""
    gigabytes: float = 0.0
    tests: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    why_not: str = ""
    """Why it was not run, or not to its end."""

    @property
    def green(self) -> bool:
        return not self.failed and not self.why_not


COLUMNS = (
    *("row", "date", "Python", "torch", "Prefect", "MLflow", "ONNX", "ONNX Runtime"),
    *("lacks", "GB", "passed", "failed", "skipped", "seconds"),
)
HEAD = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]


def chosen(rows: tuple[Row, ...], names: list[str]) -> list[Row]:
    """The rows of these names, all without one. Raises ValueError for a name that no row has."""
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        raise ValueError(f"no row is called {', '.join(unknown)}; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name in names]


def line(row: Row, answer: Answer) -> str:
    """The row of the table."""
    versions = answer.versions or {}
    passed = answer.tests - answer.skipped - len(answer.failed)
    cells = [row.name, answer.date, answer.python or row.python, *(versions.get(name, "–") for name in SHOWN)]
    if answer.versions is None:
        return f"| {' | '.join(cells)} | – | – | not run: {answer.why_not} | – | – | – |"
    cells.append(", ".join(name for name in GO_WITH_TORCH if name not in versions) or "–")
    failed = f"{len(answer.failed)}: {', '.join(f'`{name}`' for name in answer.failed)}" if answer.failed else "0"
    cells += [f"{answer.gigabytes:.1f}", f"{passed}", failed, f"{answer.skipped}", f"{answer.seconds:.0f}"]
    if answer.why_not:
        cells[-4] = f"{passed}; {answer.why_not}"
    return f"| {' | '.join(cells)} |"


def table(rows: tuple[Row, ...], answers: dict[str, Answer], before: str) -> str:
    """The whole table. before: the page as it was, from which rows without an answer keep their lines."""
    kept = {found[1]: found[0] for found in re.finditer(r"^\| (\S+) \| .*\|$", before, re.MULTILINE)}
    lines = [
        line(row, answers[row.name]) if row.name in answers else kept[row.name]
        for row in rows
        if row.name in answers or row.name in kept
    ]
    return "\n".join([*HEAD, *lines])

"""The table of docs/versions.md says what was run and what was not, and keeps the rows that were not asked."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.matrix import CORE, PAGE, REPOSITORY, ROWS, Answer, Row, chosen, line, table

ROW = Row(name="3.11", python="3.11", torch="torch==2.13.0+cpu")
OTHER = Row(name="3.99", python="3.99", torch="torch==2.13.0")
VERSIONS = {
    "torch": "2.13.0+cpu",
    "prefect": "3.8.8",
    "mlflow": "3.17.2",
    "onnx": "1.23.2",
    "onnxruntime": "1.31.1",
    "torchao": "0.18.0",
}
GREEN = Answer(
    date="2026-11-29", python="3.11.7", versions=VERSIONS, gigabytes=2.34, tests=700, skipped=1, seconds=181.4
)


def test_a_line_says_what_was_there_what_lacked_and_how_it_ended() -> None:
    assert line(ROW, GREEN) == (
        "| 3.11 | 2026-11-29 | 3.11.7 | 2.13.0+cpu | 3.8.8 | 3.17.2 | 1.23.2 | 1.31.1 "
        "| executorch | 2.3 | 699 | 0 | 1 | 181 |"
    )


def test_a_line_names_what_failed() -> None:
    told = line(ROW, Answer(date="today", versions={}, tests=5, failed=("unit.test_a::test_b", "unit.test_a::test_c")))
    assert "| 3 | 2: `unit.test_a::test_b`, `unit.test_a::test_c` |" in told


def test_a_row_without_an_interpreter_says_why_and_has_no_figures() -> None:
    told = line(OTHER, Answer(date="today", why_not="no python3.99 found"))
    assert "| not run: no python3.99 found |" in told and told.count("|") == line(ROW, GREEN).count("|")


def test_a_row_that_did_not_come_to_its_end_is_not_green() -> None:
    stopped = Answer(date="today", versions=VERSIONS, tests=9, why_not="not at its end after 1 s")
    assert "| 9; not at its end after 1 s | 0 |" in line(ROW, stopped)
    assert GREEN.green and not stopped.green


def test_rows_that_are_not_asked_keep_their_lines_in_the_declared_order() -> None:
    rows = (ROW, OTHER)
    first = table(rows, {"3.99": Answer(date="then", why_not="no python3.99 found")}, "")
    both = table(rows, {"3.11": GREEN}, f"# Page\n\n{first}\n\nwritten by hand\n")
    assert both.splitlines()[2:] == [line(ROW, GREEN), first.splitlines()[-1]]
    # A row that is declared no more is gone.
    assert table((ROW,), {}, both).splitlines()[2:] == [line(ROW, GREEN)]


def test_rows_are_chosen_by_name_and_a_wrong_name_says_which_there_are() -> None:
    assert chosen((ROW, OTHER), []) == [ROW, OTHER]
    assert chosen((ROW, OTHER), ["3.99"]) == [OTHER]
    with pytest.raises(ValueError, match=r"no row is called 3\.2; there are 3\.11, 3\.99"):
        chosen((ROW, OTHER), ["3.2"])


def test_the_core_is_there() -> None:
    for asked in CORE:
        file, _, test = asked.partition("::")
        assert (REPOSITORY / file).exists(), asked
        assert f"def {test}(" in (REPOSITORY / file).read_text() if test else True, asked


def test_a_python_is_a_classifier_when_its_row_was_green() -> None:
    written = PAGE.read_text()
    classifiers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["classifiers"]
    claimed = {found[1] for text in classifiers if (found := re.search(r":: (3\.\d+)$", text))}
    green = set()
    for row in ROWS:
        found = re.search(rf"^\| {re.escape(row.name)} \|.*$", written, re.MULTILINE)
        # … | passed | failed | skipped | seconds |
        passed, failed = found[0].split(" | ")[-4:-2] if found else ("", "")
        if row.name == row.python and passed.isdigit() and failed == "0":
            green.add(row.python)
    assert claimed == green, "classifiers in pyproject.toml are not the green rows of docs/versions.md"

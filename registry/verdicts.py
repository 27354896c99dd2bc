"""What verdicts say, in words and as tables."""

from __future__ import annotations

from collections.abc import Sequence

from torchworker.contract import IN_CPP, MIN_SAMPLES, PARITY, TOGETHER, RehearseResult, ValidateResult, Verdict
from train_and_ship.registry.text import Cell, Mark, Table, number, passed_or_failed

NOT_RUN = "not run"
"""Where the record of a move names what was not checked."""


def headline(verdicts: Sequence[Verdict]) -> str:
    """What failed, in a line: `accuracy 0.115, expected >= 0.2, in all 3 formats`; a gate's worst where they differ.

    verdicts: all of a validation, also those that passed.
    """
    formats = {item.format for item in verdicts}
    failed: dict[tuple[str, str], list[Verdict]] = {}
    for item in verdicts:
        if item.ran and not item.passed:
            failed.setdefault((item.gate, item.limit), []).append(item)
    parts = []
    for (gate, limit), items in failed.items():
        numbers = [item.measured for item in items if item.measured is not None and item.measured == item.measured]
        worst = min(numbers, default=None) if limit.startswith(">") else max(numbers, default=None)
        of = sorted({item.format for item in items})
        where = f"in all {len(of)} formats" if len(of) == len(formats) > 1 else f"in {', '.join(of)}"
        cases = f" ({items[0].case})" if len(items) == 1 else f" ({len(items)} times)" if len(items) > len(of) else ""
        advice = f": {items[0].note}" if gate == MIN_SAMPLES else ""
        parts.append(f"{gate} {number(worst)}, expected {limit}, {where}{cases}{advice}")
    return "; ".join(parts)


def not_run(verdicts: Sequence[Verdict]) -> list[str]:
    """What was not checked, as `aoti in C++ without Python`: neither passed nor failed."""
    return list(dict.fromkeys(f"{item.format} {item.case}" for item in verdicts if not item.ran))


def unproven_in_cpp(verdicts: Sequence[Verdict]) -> set[str]:
    """The formats that were to be run in C++ and were not."""
    return {
        item.format.removesuffix(f" {IN_CPP}") for item in verdicts if not item.ran and item.format.endswith(IN_CPP)
    }


def passed_words(verdicts: Sequence[Verdict]) -> str:
    """`all 12 gates passed`, and what was not run; for verdicts none of which failed."""
    left = not_run(verdicts)
    said = f"all {sum(item.ran for item in verdicts)} gates passed"
    return f"{said}, not run: {', '.join(left)}" if left else said


def asked_words(result: ValidateResult) -> str:
    """On how many held-out samples artifacts were held against the model, and what that says of others like them; empty
    where an older version validated.

    Where none of n independent samples differs, at most 3 / n of all do, with 95 % confidence: the rule of three
    (Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right? Interpreting Zero Numerators", JAMA 249,
    1983, 1743-1745). It is -ln(0.05) / n rounded up.
    """
    if not result.asked:
        return ""
    said = f"Held against the model on {result.asked:,} of {result.validation_samples:,} held-out samples"
    if any(item.gate == PARITY and item.ran and not item.passed for item in result.verdicts):
        return said
    share = min(1.0, 3 / result.asked)
    return f"{said}: none differs, so of others like them at most {share:.2%} do (95 %, rule of three)"


def together_in_words(result: RehearseResult) -> dict[str, str]:
    """For the record of a move: at how many sizes samples were asked together, and by which seed."""
    said = [f"{item.format}: {item.note}" for item in result.verdicts if item.case == TOGETHER]
    return {TOGETHER: "; ".join(said)} if said else {}


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A row a verdict, for logs and refusals."""
    header = ("format", "gate", "case", "measured", "limit", "verdict", "note")
    rows = [
        (
            item.format, item.gate, item.case, number(item.measured), item.limit,
            passed_or_failed(item.passed) if item.ran else NOT_RUN, item.note,
        )
        for item in verdicts
    ]  # fmt: skip
    return Table(header=header, rows=rows)


def verdicts_by_format(verdicts: Sequence[Verdict]) -> Table:
    """A row a condition and a column a format, for pages; what is known of failures below."""
    formats = list(dict.fromkeys(item.format for item in verdicts))
    # A table of parity alone needs no column that says so.
    first = 1 if all(item.gate == PARITY for item in verdicts) else 0
    found: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for item in verdicts:
        found.setdefault((item.gate, item.case, item.limit), {})[item.format] = item
    rows = [
        (*condition[first:], *(_outcome(answers.get(name)) for name in formats)) for condition, answers in found.items()
    ]
    notes = [
        f"{item.format}, {item.gate}, {item.case}: {item.note}" for item in verdicts if item.note and not item.passed
    ]
    return Table(header=(*("gate", "case", "limit")[first:], *formats), rows=rows, notes=notes)


def _outcome(verdict: Verdict | None) -> Cell:
    """Empty where the format was not asked."""
    if verdict is None:
        return ""
    if not verdict.ran:
        return NOT_RUN
    value = number(verdict.measured)
    return Mark(text=f"{value} ✓" if verdict.passed else f"{value} ✗ failed", good=verdict.passed)

"""What was proven of a run's artifacts, in its report: parity with the model, gates, and how each was captured."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torchworker.contract import PARITY
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Cell, Chart, Mark, Section, Table, Text
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import number
from train_and_ship.registry.tracking.description import by_condition, outcome

ERROR_BINS = ("same", "<1e-9", *(f"1e{decade}" for decade in range(-9, 3)), "NaN, ∞")
"""Of torchworker.contract.ErrorCounts."""


def _verdicts(files: RunFiles) -> list[Any]:
    return [SimpleNamespace(**item) for item in files.validated["verdicts"]] if files.validated else []


def parity_section(files: RunFiles) -> Section:
    verdicts = [item for item in _verdicts(files) if item.gate == PARITY]
    if not verdicts or files.validated is None:
        return Section(title="Parity", blocks=())
    said = (
        f"Every format against {files.validated['reference']}: how much of the allowed difference it uses at its "
        "worst; above 1 fails."
    )
    used: dict[str, float] = {}
    for item in verdicts:
        if item.measured is not None and item.limit == "<= 1":
            used[item.format] = max(used.get(item.format, 0.0), item.measured)
    blocks: list[Block] = [Text(text=said)]
    finite = [(name, [value]) for name, value in used.items() if value != float("inf")]
    if finite:
        blocks.append(
            Chart(
                title="Part of the allowed difference",
                svg=charts.bars(finite, ["used"], limit=1),
                note="1 is the limit",
            )
        )
    if drawn := _errors(files.validated.get("errors", ())):
        note = "|artifact − model| ÷ rms of the output, all probes; heights are logarithmic"
        blocks.append(
            Chart(title="How far answers are from the model's", svg=charts.spread(drawn, ERROR_BINS), note=note)
        )
    return Section(title="Parity", blocks=blocks, more=[_verdict_table(verdicts), *_notes(verdicts)])


def _errors(counts: Sequence[Any]) -> list[tuple[str, list[int], bool]]:
    """Over all probes: format, elements by decade of their relative difference, whether any failed."""
    found: dict[str, tuple[list[int], bool]] = {}
    for item in counts:
        so_far, failed = found.get(item["format"], ([0] * len(item["relative"]), False))
        added = [mine + more for mine, more in zip(so_far, item["relative"], strict=True)]
        found[item["format"]] = (added, failed or item["failed"])
    return [(name, numbers, failed) for name, (numbers, failed) in found.items()]


def gates_section(files: RunFiles) -> Section:
    if files.validated is None:
        return Section(title="Gates", blocks=())
    gates = [item for item in _verdicts(files) if item.gate != PARITY]
    blocks: list[Block] = []
    if gates:
        blocks += [_verdict_table(gates), *_notes(gates)]
    metrics = files.validated["metrics"]
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if names:
        said = f"Of each artifact's own outputs on {files.validated['validation_samples']:,} held-out samples:"
        rows = [
            (name, *(number(values[name]) if name in values else "" for values in metrics.values())) for name in names
        ]
        blocks += [Text(text=said), Table(header=("metric", *metrics), rows=rows)]
    return Section(title="Gates and metrics", blocks=blocks, more=_capture(files), more_title="How it was captured")


def _capture(files: RunFiles) -> list[Block]:
    if files.exported is None or files.validated is None:
        return []
    dropped = {kind: item["reason"] for kind, item in files.validated["int8"].items() if item["reason"]}
    rows = [(kind, "yes", item["method"]) for kind, item in files.exported["artifacts"].items() if kind not in dropped]
    rows += [(kind, "left out", why) for kind, why in {**files.exported["left_out"], **dropped}.items()]
    return [Table(header=("format", "released", "how, or why not"), rows=rows)]


def _verdict_table(verdicts: Sequence[Any]) -> Table:
    formats = list(dict.fromkeys(item.format for item in verdicts))
    rows: list[Sequence[Cell]] = []
    for condition, found in by_condition(verdicts).items():
        cells = [found.get(name) for name in formats]
        marks: list[Cell] = [
            outcome(item) if item is None or not item.ran else Mark(text=outcome(item), good=item.passed)
            for item in cells
        ]
        rows.append((*condition, *marks))
    return Table(header=("gate", "case", "limit", *formats), rows=rows)


def _notes(verdicts: Sequence[Any]) -> list[Block]:
    return [
        Text(text=f"{item.format}, {item.gate}, {item.case}: {item.note}")
        for item in verdicts
        if item.note and not item.passed
    ]

"""What was proven of a run's artifacts, in its report: parity with the model, gates, and how each was captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import PARITY, ErrorCounts
from train_and_ship.registry.agreement import agreement_table, agreements
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Chart, Section, Text
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import Table, number
from train_and_ship.registry.verdicts import asked_words, not_run, verdicts_by_format

CLASSES_DRAWN = 20
"""Of more, nobody reads a matrix on a phone."""
MISTAKES = 10
"""Pairs of classes that are named."""


def parity_section(files: RunFiles) -> Section:
    """How far each format is from the model."""
    verdicts = [item for item in files.validated.verdicts if item.gate == PARITY] if files.validated else []
    if not verdicts or files.validated is None:
        return Section(title="Parity", blocks=())
    said = (
        f"Every format against {files.validated.reference}: how much of the allowed difference it uses at its worst; "
        "above 1 fails."
    )
    used: dict[str, float] = {}
    for item in verdicts:
        if item.measured is not None and item.limit == "<= 1":
            used[item.format] = max(used.get(item.format, 0.0), item.measured)
    blocks: list[Block] = [Text(text=said)]
    if asked := asked_words(files.validated):
        blocks.append(Text(text=f"{asked}."))
    if files.validated.independence:
        blocks.append(Text(text=f"{files.validated.independence}."))
    if left := not_run(verdicts):
        blocks.append(Text(text=f"Not run, so neither passed nor failed: {', '.join(left)}."))
    finite = [(name, [value]) for name, value in used.items() if value != float("inf")]
    if finite:
        blocks.append(
            Chart(
                title="Part of the allowed difference",
                svg=charts.bars(finite, ["used"], limit=1),
                note="1 is the limit",
            )
        )
    if drawn := _errors(files.validated.errors):
        note = "|artifact − model| ÷ rms of the output, all probes; heights are logarithmic"
        blocks.append(Chart(title="How far answers are from the model's", svg=charts.error_histogram(drawn), note=note))
    return Section(title="Parity", blocks=blocks, more=[verdicts_by_format(verdicts)])


def _errors(counts: Sequence[ErrorCounts]) -> list[tuple[str, list[int], bool]]:
    """Over all probes: format, elements by decade of their relative difference, whether any failed."""
    found: dict[str, tuple[list[int], bool]] = {}
    for item in counts:
        so_far, failed = found.get(item.format, ([0] * len(item.relative), False))
        added = [mine + more for mine, more in zip(so_far, item.relative, strict=True)]
        found[item.format] = (added, failed or item.failed)
    return [(name, numbers, failed) for name, (numbers, failed) in found.items()]


def gates_section(files: RunFiles) -> Section:
    """The other gates, with their numbers."""
    if files.validated is None:
        return Section(title="Gates", blocks=())
    gates = [item for item in files.validated.verdicts if item.gate != PARITY]
    blocks: list[Block] = [verdicts_by_format(gates)] if gates else []
    metrics = metric_table(files.validated.metrics)
    if metrics.rows:
        said = f"Of each artifact's own outputs on {files.validated.validation_samples:,} held-out samples:"
        blocks += [Text(text=said), metrics]
    blocks += _answers(files)
    more = []
    if files.trained is not None and (compared := agreements(files.job, files.trained, files.validated)):
        more.append(agreement_table(compared))
    if files.exported is not None:
        dropped = {kind: item.reason for kind, item in files.validated.int8.items() if item.reason}
        captured = {kind: item.said for kind, item in files.exported.artifacts.items() if kind not in dropped}
        more.append(capture_table(captured, {**files.exported.left_out, **dropped}))
    return Section(
        title="Gates and metrics", blocks=blocks, more=more, more_title="Held against training, and how it was captured"
    )


def _answers(files: RunFiles) -> list[Block]:
    """A confusion matrix, or residuals; of many classes the most frequent mistakes alone."""
    found = files.validated.answers if files.validated else None
    if found is None:
        return []
    if found.numbers:
        drawn = charts.residuals(found.counts, *found.numbers)
        return [Chart(title="Residuals", note=f"answer − right over what was right; {found.format}", svg=drawn)]
    labels = files.job.export.labels or ()
    names = [labels[place] if place < len(labels) else str(place) for place in range(len(found.counts))]
    wrong = [
        (count, names[right], names[answer], count / sum(row))
        for right, row in enumerate(found.counts)
        for answer, count in enumerate(row)
        if count and answer != right
    ]
    wrong.sort(key=lambda item: -item[0])
    rows = [(right, answer, f"{count:,}", f"{share:.1%}") for count, right, answer, share in wrong[:MISTAKES]]
    mistakes = Table(header=("right", "answered", "times", "of that class"), rows=rows)
    if len(names) > CLASSES_DRAWN:
        return [Text(text=f"The most frequent mistakes of {found.format}:"), mistakes] if rows else []
    drawn = charts.confusion(found.counts, names)
    instead = mistakes if rows else Table(rows=[("mistakes", "none")])
    return [
        Chart(title="Confusion matrix", note=f"{found.format}; shades are shares of a row", svg=drawn, instead=instead)
    ]


def metric_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """A column a format. metrics: format to metric to value."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [(name, *(number(values[name]) if name in values else "" for values in metrics.values())) for name in names]
    return Table(header=("metric", *metrics), rows=rows)


def capture_table(captured: Mapping[str, str], left_out: Mapping[str, str]) -> Table:
    """A row a format. captured: format to how it was made; left_out: format to why it could not be."""
    rows = [(name, "yes", how) for name, how in captured.items()]
    rows += [(name, "left out", why) for name, why in left_out.items()]
    return Table(header=("format", "released", "how, or why not"), rows=rows)

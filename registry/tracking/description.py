"""The markdown that people read on a model version's page in MLflow.

That page shows neither metrics nor files of its own, so the description carries them. Its first line is plain
text, because lists of versions show it unrendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import PARITY, Verdict
from train_and_ship.registry.text import cell, file_size, number, table


def describe(
    *,
    model: str,
    release: str,
    formats: Mapping[str, str],
    sizes: Mapping[str, int],
    verdicts: Sequence[Verdict],
    metrics: Mapping[str, Mapping[str, float]],
    training: Mapping[str, float],
    links: Mapping[str, str],
    reference: str = "the trained model",
    captured: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
    speed: str = "",
    int8: str = "",
) -> str:
    """Describe one version.

    `formats` maps a format to its file name, `sizes` a file name to bytes, `metrics` a format to its measured
    values, `training` holds the last values of the history, `links` maps a text to a URL (an empty URL is
    left out), `reference` says what parity was measured against, `captured` how each format was made and `left_out` why
    others could not be; `speed` and `int8` are what was measured, as markdown.
    """
    parity = [verdict for verdict in verdicts if verdict.gate == PARITY]
    gates = [verdict for verdict in verdicts if verdict.gate != PARITY]
    intro = [
        _first_line(model, release, formats, verdicts, metrics),
        " · ".join([f"Release `{release}`", *(f"[{cell(text)}]({url})" for text, url in links.items() if url)]),
    ]
    sections = []
    if parity:
        unit = f"How much of the allowed difference from {reference} each artifact uses; above 1 fails."
        sections.append(f"### Parity\n{unit}\n\n{_verdict_table(parity, with_gate=False)}")
    if captured or left_out:
        rows = [(name, "yes", how) for name, how in (captured or {}).items()]
        rows += [(name, "left out", why) for name, why in (left_out or {}).items()]
        sections.append(f"### Capture\n{table(('format', 'released', 'how, or why not'), rows)}")
    if metrics:
        sections.append(f"### Metrics\n{_metric_table(metrics)}")
    if gates:
        sections.append(f"### Gates\n{_verdict_table(gates, with_gate=True)}")
    if int8:
        sections.append(f"### int8\n{int8}")
    if speed:
        sections.append(f"### Speed\n{speed}")
    if sizes:
        format_of = {file: name for name, file in formats.items()}
        files = [(f"`{file}`", format_of.get(file, ""), file_size(size)) for file, size in sizes.items()]
        sections.append(f"### Files\n{table(('file', 'format', 'size'), files)}")
    if training:
        where = "step" if "step" in training else "epoch"
        last = f" ({number(training[where])})" if where in training else ""
        values = [(name, number(value)) for name, value in training.items() if name not in (where, "time")]
        sections.append(f"### Last {where}{last}\n{table(('metric', 'value'), values)}")
    # MLflow's page sets no space between a table and the next heading.
    return "\n\n".join([*intro, "\n\n\u00a0\n\n".join(sections)]).rstrip() + "\n"


def in_short(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """One line a gate, for the record of a move: how many were evaluated, and the numbers."""
    found: dict[str, str] = {}
    for gate in dict.fromkeys(verdict.gate for verdict in verdicts):
        of_gate = [verdict for verdict in verdicts if verdict.gate == gate]
        numbers = sorted(verdict.measured for verdict in of_gate if verdict.measured is not None)
        measured = f"{number(numbers[0])} to {number(numbers[-1])}" if numbers else "not measured"
        ran = [verdict for verdict in of_gate if verdict.ran]
        left = f", {len(of_gate) - len(ran)} not run" if len(ran) < len(of_gate) else ""
        limits = ", ".join(dict.fromkeys(verdict.limit for verdict in of_gate))
        found[gate] = f"{sum(verdict.passed for verdict in ran)} of {len(ran)} passed{left}, {measured} ({limits})"
    return found


def _first_line(
    model: str,
    release: str,
    formats: Mapping[str, str],
    verdicts: Sequence[Verdict],
    metrics: Mapping[str, Mapping[str, float]],
) -> str:
    ran = [verdict for verdict in verdicts if verdict.ran]
    failed = sum(not verdict.passed for verdict in ran)
    if not ran:
        outcome = "not validated"
    elif failed:
        outcome = f"{failed} of {len(ran)} gates failed"
    else:
        outcome = f"all {len(ran)} gates passed"
    # Lists of versions show about fifteen characters, so the model's name comes late.
    first_metric = next(((name, value) for values in metrics.values() for name, value in values.items()), None)
    quality = f"{first_metric[0]} {number(first_metric[1])}, " if first_metric else ""
    return f"{quality}{outcome}: {model} {release} as {', '.join(formats)}."


def by_condition(verdicts: Sequence[Verdict]) -> dict[tuple[str, str, str], dict[str, Verdict]]:
    """What each format said to one question: gate, case and limit to format to verdict, in order."""
    found: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for verdict in verdicts:
        found.setdefault((verdict.gate, verdict.case, verdict.limit), {})[verdict.format] = verdict
    return found


def outcome(verdict: Verdict | None) -> str:
    """A cell of a table with a column a format; empty where the format was not asked."""
    if verdict is None:
        return ""
    value = number(verdict.measured)
    return f"{value} ✓" if verdict.passed else f"{value} ✗ failed" if verdict.ran else "not run"


def _verdict_table(verdicts: Sequence[Verdict], *, with_gate: bool) -> str:
    """One line a condition, one column a format; what is known of failures below."""
    formats = list(dict.fromkeys(verdict.format for verdict in verdicts))
    rows = [
        (*condition[0 if with_gate else 1 :], *(_verdict_cell(found.get(name)) for name in formats))
        for condition, found in by_condition(verdicts).items()
    ]
    notes = [
        f"- {verdict.format}, {verdict.gate}, {verdict.case}: {cell(verdict.note)}"
        for verdict in verdicts
        if verdict.note and not verdict.passed
    ]
    header = (*(("gate",) if with_gate else ()), "case", "limit", *formats)
    return "\n\n".join([table(header, rows), *(["\n".join(notes)] if notes else [])])


def _verdict_cell(verdict: Verdict | None) -> str:
    failed = verdict is not None and verdict.ran and not verdict.passed
    return f"**{outcome(verdict)}**" if failed else outcome(verdict)


def _metric_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [(name, *(number(values[name]) if name in values else "" for values in metrics.values())) for name in names]
    return table(("metric", *metrics), rows)

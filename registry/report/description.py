"""The markdown that people read on a model version's page in MLflow.

That page shows neither metrics nor files of its own, so the description carries them. Its first line is plain
text, because lists of versions show it unrendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import PARITY, ValidateResult, Verdict
from train_and_ship.registry.report.proof_sections import capture_table, metric_table
from train_and_ship.registry.report.speed import how_measured, int8_table, speed_table
from train_and_ship.registry.text import Table, escaped, file_size, number, one_line
from train_and_ship.registry.verdicts import (
    NOT_RUN,
    asked_words,
    not_run,
    passed_words,
    unproven_in_cpp,
    verdicts_by_format,
)


def describe(
    *,
    model: str,
    release: str,
    formats: Mapping[str, str],
    sizes: Mapping[str, int],
    result: ValidateResult,
    training: Mapping[str, float],
    links: Mapping[str, str],
    captured: Mapping[str, str],
    left_out: Mapping[str, str],
    shipped: str = "",
    environments: str = "",
) -> str:
    """Describe one version.

    Args:
        model: Its name.
        release: The release that the version holds.
        formats: Format to file name.
        sizes: File name to bytes.
        result: What was proven and measured.
        training: What the history says of the weights that ship.
        links: Text to URL; one with an empty URL is left out.
        captured: Format to how it was made.
        left_out: Format to why it could not be made.
        shipped: Which epoch that is and why, in words; empty for the last.
        environments: Where it was made and proven, in words; empty where that is one environment.
    """
    parity = [verdict for verdict in result.verdicts if verdict.gate == PARITY]
    gates = [verdict for verdict in result.verdicts if verdict.gate != PARITY]
    speed = result.speed
    intro = [
        escaped(_first_line(model, release, formats, result)),
        " · ".join([f"Release `{release}`", *(f"[{one_line(text)}]({url})" for text, url in links.items() if url)]),
    ]
    if environments:
        intro.append(escaped(f"{environments[0].upper()}{environments[1:]}."))
    unit = f"How much of the allowed difference from {escaped(result.reference)} each artifact uses; above 1 fails."
    if asked := asked_words(result):
        unit += f" {asked}."
    if result.independence:
        unit += f" {escaped(one_line(result.independence))}."
    format_of = {file: name for name, file in formats.items()}
    files = [(file, format_of.get(file, ""), file_size(size)) for file, size in sizes.items()]
    where = "step" if "step" in training else "epoch"
    which = "Epoch that ships" if shipped else f"Last {where}"
    last = f" ({number(training[where])})" if where in training else ""
    values = [(name, number(value)) for name, value in training.items() if name not in (where, "time")]
    parts = [
        ("Parity", unit, verdicts_by_format(parity)),
        ("Capture", "", capture_table(captured, left_out)),
        ("Metrics", "", metric_table(result.metrics)),
        ("Gates", "", verdicts_by_format(gates)),
        ("int8", "", int8_table(result.int8)),
        (
            "Speed",
            escaped(how_measured(speed)) if speed else "",
            speed_table(speed, unproven_in_cpp(result.verdicts)) if speed else Table(rows=()),
        ),
        ("Files", "", Table(header=("file", "format", "size"), rows=files)),
        (f"{which}{last}", escaped(shipped), Table(header=("metric", "value"), rows=values)),
    ]
    sections = [
        f"### {title}\n{said}\n\n{table.markdown()}" if said else f"### {title}\n{table.markdown()}"
        for title, said, table in parts
        if table.rows
    ]
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
    if left_out := not_run(verdicts):
        found[NOT_RUN] = ", ".join(left_out)
    return found


def _first_line(model: str, release: str, formats: Mapping[str, str], result: ValidateResult) -> str:
    ran = [verdict for verdict in result.verdicts if verdict.ran]
    failed = sum(not verdict.passed for verdict in ran)
    if not ran:
        outcome = "not validated"
    elif failed:
        outcome = f"{failed} of {len(ran)} gates failed"
    else:
        outcome = passed_words(result.verdicts)
    # Lists of versions show about fifteen characters, so the model's name comes late.
    first_metric = next(((name, value) for values in result.metrics.values() for name, value in values.items()), None)
    quality = f"{first_metric[0]} {number(first_metric[1])}, " if first_metric else ""
    return f"{quality}{outcome}: {model} {release} as {', '.join(formats)}."

"""How a run was trained, in its report: the learning curves, and what trained on what."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchworker.contract import ShownWarning, TrainResult
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Chart, Section, Text
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import Cell, Table, number
from train_and_ship.registry.tracking.curves import Point, shipped_of

CURVES = 12
"""Most charts of learning curves: the others are in MLflow."""
QUIET = ("seconds", "samples_per_second", "learning_rate", "epoch")
"""Curves of how it was trained, not of how well."""
WARNINGS_SHOWN = 50
ROWS = 100
"""Longest table of learning curves."""


def curves_section(files: RunFiles) -> Section:
    """The learning curves."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in files.points:
        found.setdefault(point.key, []).append((float(point.step), point.value))
    over = "step" if _by_step(files) else "epoch"
    pairs: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, curve in found.items():
        # A training metric and the same one on held-out data belong together.
        shared = name.removeprefix("train_").removeprefix("validation_")
        both = f"train_{shared}" in found and f"validation_{shared}" in found
        pairs.setdefault(shared if both else name, {})[name] = sorted(curve)
    telling = {name: series for name, series in pairs.items() if name not in QUIET}
    quiet = {name: series for name, series in pairs.items() if name in QUIET and name != "epoch"}
    blocks: list[Block] = []
    for name, series in list(telling.items())[:CURVES]:
        blocks.append(Chart(title=name.replace("_", " "), svg=charts.lines(series, over)))
    if len(telling) > CURVES:
        blocks.append(Text(text=f"{len(telling) - CURVES} more curves are in MLflow."))
    if blocks and files.trained is None:
        blocks.insert(0, Text(text="Training did not end; this is how far it came."))
    more: list[Block] = [
        Chart(title=name.replace("_", " "), svg=charts.lines(series, over)) for name, series in quiet.items()
    ]
    if found:
        more += history_tables(files.points, over)
    return Section(title="Learning curves", blocks=blocks, more=more)


def _by_step(files: RunFiles) -> bool:
    history = files.trained.history if files.trained else ()
    return "step" in history[0] if history else files.job.train.entrypoint is not None


def history_tables(points: Sequence[Point], over: str) -> list[Block]:
    """A table for what was reported at the same places; of many rows a few, evenly spaced and with the last one."""
    curves: dict[str, dict[int, float]] = {}
    for point in points:
        curves.setdefault(point.key, {})[point.step] = point.value
    together: dict[tuple[int, ...], list[str]] = {}
    for name, curve in curves.items():
        together.setdefault(tuple(sorted(curve)), []).append(name)
    blocks: list[Block] = []
    for steps, names in together.items():
        every = math.ceil(len(steps) / ROWS)
        shown = steps[::-1][::every][::-1]
        rows = [(str(step), *(number(curves[name][step]) for name in names)) for step in shown]
        blocks.append(Table(header=(over, *names), rows=rows))
        if every > 1:
            blocks.append(Text(text=f"{len(shown)} of {len(steps)} rows; MLflow has them all."))
    return blocks


def training_section(files: RunFiles) -> Section:
    """What trained on what."""
    job, trained = files.job, files.trained
    rows: list[Sequence[Cell]] = [("model", f"{job.model.factory} {dict(job.model.args) or ''}".strip())]
    if trained is None:
        rows.append(("data", job.data.factory))
    else:
        held = f"{trained.train_samples:,} samples, {trained.validation_samples:,} held out"
        rows += [("data", f"{job.data.factory}, {held}"), *trained.environment.items()]
        if shipped := shipped_words(job, trained):
            rows.append(("ships", shipped))
        rows += [("note", note) for note in trained.notes]
    return Section(title="What was trained", blocks=[Table(rows=rows)])


def warnings_section(files: RunFiles) -> Section:
    """What Python's warnings said in the logs, each with who says it in which version, as another one may not."""
    rows: list[Sequence[Cell]] = [
        (_who(shown), f"{shown.category}: {shown.text}", shown.where, ", ".join(stages))
        for shown, stages in files.warnings.items()
    ]
    if not rows:
        return Section(title="Warnings", blocks=())
    table = Table(header=("from", "warning", "points at", "stages"), rows=rows[:WARNINGS_SHOWN])
    more = len(rows) - WARNINGS_SHOWN
    return Section(
        title="Warnings", blocks=[table, *([Text(text=f"{more} more are in the logs.")] if more > 0 else [])]
    )


def _who(shown: ShownWarning) -> str:
    return f"{shown.package} {shown.version}".strip() or "your code"


def shipped_words(job: Job, trained: TrainResult) -> str:
    """Which epoch's weights ship and why; empty where that is not known, as of a custom loop."""
    epoch, last = trained.shipped_epoch, len(trained.history)
    if not epoch:
        return ""
    averaged = f", averaged over the steps (ema {job.train.ema:g})" if job.train.ema is not None else ""
    if not trained.chosen_by:
        return f"epoch {epoch}, the last{averaged}"
    value = number(shipped_of(trained)[trained.chosen_by])
    return (
        f"epoch {epoch} of {last}{averaged}: {trained.chosen_by} {value} is the best. It was chosen on the validation "
        "samples, which the gates measure on too, so their numbers are a little optimistic"
    )

"""The last page of a run: one markdown artifact that says what was trained, proven and released."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from registry.description import number, table
from registry.gates import COMPARED, compare, interval_text
from registry.keys import release_prefix
from registry.mirror import CHALLENGER
from tasks.policy import artifact_key
from tasks.promote import Kept, Promoted
from tasks.register import Registered
from tasks.rehearse import Rehearsed
from tasks.run import Run
from tasks.tell import PROMOTED, tell
from tasks.train import Trained

ROWS = 100
"""Longest table of learning curves."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """Where to look at what a run made."""

    title: str
    release: str
    run_url: str
    version_url: str
    release_uri: str
    report: Path
    timings: Path


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
async def report(run: Run, trained: Trained, registered: Registered, promoted: Promoted) -> Shipped:
    """Write the report, as a Prefect artifact and as a file of the run."""
    title = f"{run.job.name} release {promoted.pointer.release} is live on {promoted.pointer.channel}"
    markdown = render(run, trained, registered, promoted.rehearsed, promoted, title=title)
    path = run.folder / "report.md"
    path.write_text(markdown)
    await acreate_markdown_artifact(markdown, key=f"report-{artifact_key(run.job.name)}", description=title)
    tell(PROMOTED, run.job.name, title, in_short(run, registered, promoted.rehearsed, promoted))
    return Shipped(
        title=title,
        release=registered.manifest.release,
        run_url=run.flow_run_url,
        version_url=registered.version.version_url,
        release_uri=f"s3://{run.settings.bucket}/{release_prefix(run.job.name, registered.manifest.release)}",
        report=path,
        timings=run.write_timings(),
    )


def in_short(run: Run, registered: Registered, rehearsed: Rehearsed, outcome: Promoted | Kept) -> str:
    """What people are told."""
    if isinstance(outcome, Kept):
        first = outcome.why
    else:
        replaced = outcome.pointer.previous
        first = f"Replaces {replaced}" if replaced else "The first release"
    compared = [f"{name}: {said}" for name, said in rehearsed.in_words().items()]
    links = [f"Run: {run.flow_run_url}", f"Version: {registered.version.version_url}"]
    return "\n".join([first, *compared, *links])


def _beside_live(rehearsed: Rehearsed) -> list[str]:
    """What came back from the bucket, beside what was live; nothing when there was none."""
    if not rehearsed.live:
        return []
    title = f"## Beside the live release `{rehearsed.live}`"
    result = rehearsed.result
    if result.live_problem:
        return [f"{title}\n\nIt could not be scored: {result.live_problem}"]
    beside = rehearsed.beside
    mine = {**beside.candidate, **result.candidate_speed}
    theirs = {**beside.theirs, **result.live_speed}
    rows = [
        (name, number(value), number(theirs.get(name)), interval_text(beside.intervals.get(name)))
        for name, value in mine.items()
    ]
    samples = (
        f"Both downloaded from the bucket and run by one process on the same {result.samples:,} samples. The interval "
        f"({rehearsed.job.release.confidence:.0%}, paired bootstrap) is of the improvement: above 0 the candidate is "
        "better."
    )
    if result.live_speed:
        samples += " Times, sizes and memory were measured by turns."
    found = [title, samples, table(("metric", "candidate", "live", "improvement"), rows)]
    asked = [item.row() for item in compare(rehearsed.job, beside)]
    return ["\n\n".join([*found, *([table(COMPARED, asked)] if asked else [])])] if rows else []


def render(
    run: Run,
    trained: Trained,
    registered: Registered,
    rehearsed: Rehearsed,
    outcome: Promoted | Kept,
    *,
    title: str,
    asked: str = "",
) -> str:
    """The report as markdown. asked: what retraining decided, and why."""
    version, result = registered.version, trained.result
    prefix = f"s3://{run.settings.bucket}/models/{run.job.name}"
    alias = outcome.alias if isinstance(outcome, Promoted) else CHALLENGER
    where = [
        (
            "MLflow version",
            f"[{run.job.name} version {version.version}, alias {alias}]({version.version_url})",
        ),
        ("MLflow run", f"[parameters, curves, data]({version.run_url})"),
        ("Release", f"`{prefix}/releases/{registered.manifest.release}/`"),
        *_channel_rows(prefix, run.job.release.channel, outcome),
        ("Run directory", f"`{run.folder}`"),
    ]
    trained_what = [
        ("model", f"`{run.job.model.factory}` {dict(run.job.model.args) or ''}"),
        ("data", f"`{run.job.data.factory}`, {result.train_samples:,} samples, {result.validation_samples:,} held out"),
        ("data fingerprint", f"`{result.data_fingerprint}`"),
        ("git commit", f"`{run.git_commit}`"),
        ("processes", result.environment["processes"]),
        ("torch", result.environment["torch"]),
    ]
    seconds = [(stage, f"{value:.2f}") for stage, value in run.seconds.items()]
    return "\n\n".join(
        [
            f"# {title}",
            *([asked] if asked else []),
            table(("where", "link"), where),
            f"## What was trained\n\n{table(('what', 'value'), trained_what)}",
            f"## Data\n\n{registered.data}",
            f"## What was proven\n\n{registered.description}",
            *_beside_live(rehearsed),
            f"## Learning curves\n\n{curves(result.history)}",
            f"## Seconds by stage\n\n{table(('stage', 'seconds'), seconds)}",
        ]
    )


def _channel_rows(prefix: str, channel: str, outcome: Promoted | Kept) -> list[tuple[str, str]]:
    if isinstance(outcome, Kept):
        return [("Stays live", f"`{outcome.live}` on `{prefix}/channels/{channel}.json`")]
    pointer = outcome.pointer
    return [
        ("Channel", f"`{prefix}/channels/{channel}.json`, generation {pointer.generation}"),
        ("Replaces", f"`{pointer.previous}`" if pointer.previous else "nothing, this is the first"),
    ]


def curves(history: Sequence[Mapping[str, float]]) -> str:
    """A table for each kind of row; of many rows a few, evenly spaced and with the last one."""
    kinds: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for row in history:
        kinds.setdefault(tuple(row), []).append(row)
    return "\n\n".join(_curve(names, rows) for names, rows in kinds.items())


def _curve(keys: Sequence[str], history: Sequence[Mapping[str, float]]) -> str:
    where = "step" if "step" in keys else "epoch"
    names = [name for name in keys if name not in ("time", where)]
    every = math.ceil(len(history) / ROWS)
    shown = history[::-1][::every][::-1]
    rows = [(f"{row[where]:g}", *(f"{row[name]:.4g}" for name in names)) for row in shown]
    left_out = f"\n\n{len(shown)} of {len(history)} rows; MLflow has them all." if every > 1 else ""
    return table((where, *names), rows) + left_out

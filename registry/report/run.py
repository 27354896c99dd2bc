"""The report of a run: everything that a person asks about it, on one page, however the run ended.

What a run did not come to is left out; sections stand in the order in which people ask. No store, no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from train_and_ship.registry.cost import Rates, Spent
from train_and_ship.registry.gates import COMPARED, Beside, compare, interval_text, worst
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.cost_section import cost_section
from train_and_ship.registry.report.data_sections import data_section
from train_and_ship.registry.report.page import Block, Cell, Chart, Lines, Link, Mark, Page, Section, Table, Text
from train_and_ship.registry.report.proof_sections import gates_section, parity_section
from train_and_ship.registry.report.training_sections import curves_section, training_section
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import file_size, number


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    verdict: str
    """One word."""
    good: bool
    title: str
    why: str
    table: str = ""
    """Numbers behind the reason, as aligned text."""
    facts: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    """Name and value of what else there is to say about the decision."""
    places: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    """Name and value of where to look."""


def run_page(outcome: Outcome, files: RunFiles | None, rates: Rates, bucket: str, costs: Sequence[Spent] = ()) -> Page:
    """The report. files: None for a run that ended before it began to work, which has costs alone. bucket: its name."""
    sections = [decision_section(outcome)]
    if files is None:
        sections.append(cost_section(costs, rates))
    else:
        sections += [
            _beside(files),
            _latency(files),
            parity_section(files),
            gates_section(files),
            curves_section(files),
            data_section(files.facts, files.checks),
            cost_section(costs or files.costs, rates),
            training_section(files),
            _lineage(files),
        ]
    return Page(
        title=outcome.title,
        verdict=outcome.verdict,
        good=outcome.good,
        intro=_intro(files),
        facts=Table(rows=[*outcome.places, *(_places(files, bucket) if files else [])]),
        sections=[section for section in sections if not section.empty],
    )


def decision_section(outcome: Outcome) -> Section:
    """What was decided, and why."""
    blocks: list[Block] = [
        Lines(text=f"{outcome.why}\n\n{outcome.table}") if outcome.table else Text(text=outcome.why),
        *([Table(rows=outcome.facts)] if outcome.facts else []),
    ]
    return Section(title="Decision", blocks=blocks)


def _intro(files: RunFiles | None) -> str:
    if files is None:
        return ""
    began = str(files.about["begun"])[:16].replace("T", " ")
    return f"Run {files.about['flow_run_name']}, begun {began} UTC."


def _places(files: RunFiles, bucket: str) -> list[Sequence[Cell]]:
    rows: list[Sequence[Cell]] = []
    if found := files.registered:
        rows += [
            ("MLflow version", Link(text=f"{files.job.name} version {found['version']}", url=found["version_url"])),
            ("MLflow run", Link(text="parameters, curves, data", url=found["run_url"])),
            ("this report", Link(text="with its charts, in MLflow", url=f"{found['run_url']}/artifacts/report.html")),
        ]
    if files.against is not None:
        rows.append(("release", f"s3://{bucket}/models/{files.job.name}/releases/{files.release}/"))
    return [*rows, ("run directory", str(files.folder))]


# ---- against what is live


def _beside(files: RunFiles) -> Section:
    result, against = files.compared, files.against
    if result is None or against is None:
        return Section(title="Beside the live release", blocks=())
    if not against["live"]:
        return Section(title="Beside the live release", blocks=[Text(text="Nothing was live to hold it against.")])
    title = f"Beside the live release {against['live']}"
    if result["live_problem"]:
        return Section(title=title, blocks=[Text(text=f"It could not be scored: {result['live_problem']}")])
    job = files.job
    spans = {name: (item["low"], item["high"]) for name, item in result["intervals"].items()}
    beside = Beside(
        live=against["live"], candidate=worst(job, result["candidate"]), theirs=worst(job, result["live"]),
        intervals=spans, problem=result["live_problem"],
    )  # fmt: skip
    asked = compare(job, beside)
    policy = next((item for item in asked if not item.needs.startswith("vs_live")), None)
    margin = job.release.margin if job.release.policy == "better" else -job.release.margin
    drawn = [
        charts.Span(
            name=name, low=low, high=high, middle=_gain(files, name, beside),
            limit=margin if policy is not None and policy.metric == name else 0.0,
            passed=all(item.passed for item in asked if item.metric == name),
        )
        for name, (low, high) in spans.items()
    ]  # fmt: skip
    mine, theirs = {**beside.candidate, **result["candidate_speed"]}, {**beside.theirs, **result["live_speed"]}
    rows: list[Sequence[Cell]] = [
        (name, number(value), number(theirs.get(name)), interval_text(spans.get(name))) for name, value in mine.items()
    ]
    said = (
        f"Both were downloaded from the bucket and run by one process on the same {result['samples']:,} samples. The "
        f"interval ({job.release.confidence:.0%}, paired bootstrap) is of the improvement: above 0 the candidate is "
        "better."
    )
    if result["live_speed"]:
        said += " Times, sizes and memory were measured by turns."
    blocks: list[Block] = [Text(text=said)]
    if drawn:
        blocks.append(Chart(title="Improvement over the live release", svg=charts.intervals(drawn)))
    blocks.append(Table(header=("metric", "candidate", "live", "interval of the improvement"), rows=rows))
    if asked:
        verdicts: list[Sequence[Cell]] = [
            (*item.row()[:-1], Mark(text=item.row()[-1], good=item.passed)) for item in asked
        ]
        blocks.append(Table(header=COMPARED, rows=verdicts))
    return Section(title=title, blocks=blocks)


def _gain(files: RunFiles, metric: str, beside: Beside) -> float | None:
    mine, theirs = beside.candidate.get(metric), beside.theirs.get(metric)
    if mine is None or theirs is None:
        return None
    return mine - theirs if files.job.direction(metric) == "higher" else theirs - mine


def _latency(files: RunFiles) -> Section:
    """Speed of every format, beside what the live release recorded of itself when it was made."""
    speed = (files.validated or {}).get("speed")
    if not speed:
        return Section(title="Speed", blocks=())
    mine, theirs = _calls(speed), _calls((files.against or {}).get("speed") or {})
    batches = sorted({batch for _, batch in mine})
    kinds = list(dict.fromkeys(kind for kind, _ in mine))
    beside = any((kind, batches[0]) in theirs for kind in kinds) if batches else False
    series = ("candidate", "live") if beside else ("candidate",)
    blocks: list[Block] = []
    for batch in dict.fromkeys(batches[:1] + batches[-1:]):
        rows = [
            (kind, [_p50(mine.get((kind, batch))), *([_p50(theirs.get((kind, batch)))] if beside else [])])
            for kind in kinds
        ]
        drawn = charts.bars(rows, series, lambda value: f"{number(value)} ms")
        blocks.append(Chart(title=f"Median of a call at batch {batch}", note="shorter is faster", svg=drawn))
    threads = speed["threads"]
    said = f"{threads} {'thread' if threads == 1 else 'threads'} on {speed['machine']}, all formats by turns."
    if beside:
        said += (
            f" The live release's times are what it recorded when it was made, on {files.against['speed']['machine']}: "  # type: ignore[index]
            "not measured beside these. A gate with times_live has both measured by turns."
        )
    blocks.insert(0, Text(text=said))
    return Section(title="Speed", blocks=blocks, more=[_speed_table(speed)])


def _calls(speed: Any) -> dict[tuple[str, int], Any]:
    return {
        (kind, item["batch"]): item for kind, found in speed.get("measured", {}).items() for item in found["speeds"]
    }


def _p50(item: Any) -> float | None:
    return None if item is None else float(item["p50_ms"])


def _speed_table(speed: Any) -> Table:
    rows: list[Sequence[Cell]] = []
    for kind, found in speed["measured"].items():
        purposes = " and ".join(purpose for purpose, chosen in speed["serve"].items() if chosen == kind)
        memory = "not measured" if found["memory_bytes"] is None else file_size(found["memory_bytes"])
        if found["problem"]:
            rows.append((kind, found["problem"], "", "", "", "", file_size(found["bytes"]), memory, purposes))
        for place, item in enumerate(found["speeds"]):
            whole = (number(found["load_ms"]), file_size(found["bytes"]), memory, purposes)
            calls = (number(item["p50_ms"]), number(item["p99_ms"]))
            rate = f"{1000 * item['batch'] / item['p50_ms']:,.0f}" if item["p50_ms"] else ""
            rows.append((kind, str(item["batch"]), *calls, rate, *(whole if place == 0 else ("", "", "", ""))))
    header = ("format", "batch", "p50 ms", "p99 ms", "samples/s", "load ms", "size", "memory", "recommended for")
    return Table(header=header, rows=rows)


# ---- what it came from


def _lineage(files: RunFiles) -> Section:
    return Section(title="Lineage", blocks=[Table(rows=list(_origins(files)))], more=_packages(files))


def _origins(files: RunFiles) -> Iterator[Sequence[Cell]]:
    about, made, lineage = files.about, files.made_from or {}, files.lineage or {}
    inputs = lineage.get("inputs", {})
    if files.release:
        yield ("release", files.release)
    if files.against is not None:
        yield ("parent release", files.against["live"] or "none: nothing was live")
    if lineage:
        yield ("started from", lineage["start"] or "scratch")
    commit = made.get("git_commit", about["git_commit"])
    yield ("git commit", commit)
    if about["git_commit"] != commit:
        yield ("git commit of the rest", about["git_commit"])
    if made:
        yield ("code", made["code"])
    if files.facts is not None:
        yield ("training data", files.facts["train"]["fingerprint"])
        yield ("held-out data", files.facts["validation"]["fingerprint"])
    if about["snapshot"]:
        yield ("snapshot", about["snapshot"])
    if files.trained is not None:
        yield ("samples as trained on", files.trained["data_fingerprint"])
    if "config" in inputs:
        yield ("configuration", inputs["config"])
    yield ("job", files.job.digest())
    if made:
        yield ("environment", f"{len(made['packages'])} packages, Python {made['packages'].get('python', '?')}")
    yield ("flow run", about["flow_run_id"])


def _packages(files: RunFiles) -> list[Block]:
    if files.made_from is None:
        return []
    return [Lines(text="\n".join(f"{name}=={version}" for name, version in files.made_from["packages"].items()))]

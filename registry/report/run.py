"""The report of a run: everything that a person asks about it, on one page, however the run ended.

What a run did not come to is left out; sections stand in the order in which people ask. No store, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torchworker import situations
from torchworker.contract import MeasureResult
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.cost import Rates, Spent
from train_and_ship.registry.gates import Asked, VersusLive, compare, comparison_table, how_drawn
from train_and_ship.registry.kind import kind_table
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.cost_section import cost_section
from train_and_ship.registry.report.data_sections import data_section
from train_and_ship.registry.report.page import Block, Chart, Lines, Page, Section, Text
from train_and_ship.registry.report.proof_sections import gates_section, parity_section
from train_and_ship.registry.report.speed import how_measured, speed_table
from train_and_ship.registry.report.training_sections import curves_section, training_section, warnings_section
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import Cell, Link, Table, interval_text, number
from train_and_ship.registry.tracking.runs import page_of_report
from train_and_ship.registry.verdicts import unproven_in_cpp

LONGEST_SAID, LONGEST_MACHINE = 2000, 200
"""Characters of why something is not shown, and of a processor: the live release may be another's."""


class Ending(StrEnum):
    """How a run ended, in a word; MLflow keeps it as a tag."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    KEPT = "kept"
    """The live release stays, the candidate is the challenger."""
    ROLLING_OUT = "rolling out"
    """The candidate answers a share of the requests beside what is live."""
    STAGED = "staged"
    """The candidate waits: another one is being rolled out."""
    SKIPPED = "skipped"
    WAITS = "waits"
    """For a person's approval."""
    REFUSED = "refused"
    """By a gate."""
    FAILED = "failed"
    CRASHED = "crashed"
    CANCELLED = "cancelled"

    @property
    def good(self) -> bool:
        """Whether nobody has to look after it."""
        return self not in (Ending.REFUSED, Ending.FAILED, Ending.CRASHED, Ending.CANCELLED)

    @property
    def moved(self) -> bool:
        """Whether something went live."""
        return self in (Ending.PROMOTED, Ending.ROLLED_BACK)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    verdict: Ending
    title: str
    why: str
    table: str = ""
    """Numbers behind the reason, as aligned text."""
    facts: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    """Name and value of what else there is to say about the decision."""
    meanwhile: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    """Name and value of what stays so, and what to do, where it did not go well."""
    places: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    """Name and value of where to look."""


def run_page(outcome: Outcome, files: RunFiles | None, rates: Rates, bucket: str, costs: Sequence[Spent] = ()) -> Page:
    """The report of a run.

    Args:
        outcome: How it ended.
        files: What its folder tells; None for a run that ended before it began to work, which has costs alone.
        rates: What an hour costs.
        bucket: Its name.
        costs: Those to show, when they are not what the folder tells.
    """
    sections = [decision_section(outcome)]
    if files is None:
        sections.append(cost_section(costs, rates))
    else:
        sections += [
            _sound("Beside the live release", lambda: _versus_live(files)),
            _sound("Speed", lambda: _speed(files)),
            _sound("Parity", lambda: parity_section(files)),
            _sound("Gates and metrics", lambda: gates_section(files)),
            _sound("Learning curves", lambda: curves_section(files)),
            _sound("Data", lambda: data_section(files.facts, files.checks)),
            _sound("Cost", lambda: cost_section(costs or files.costs, rates)),
            _sound("What was trained", lambda: training_section(files)),
            _sound("Warnings", lambda: warnings_section(files)),
            _sound("Lineage", lambda: _lineage(files)),
        ]
    return outcome_page(outcome, sections, _places(files, bucket) if files else [], _intro(files))


def _sound(title: str, make: Callable[[], Section]) -> Section:
    """The section; in its place what is wrong with its numbers: a run is asked about, and ends, with a report."""
    try:
        return make()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = on_one_line(f"{type(error).__name__}: {error}", LONGEST_SAID)
        return Section(title=title, blocks=[Text(text=f"It cannot be shown: {said}")])


def outcome_page(
    outcome: Outcome, sections: Sequence[Section], places: Sequence[Sequence[Cell]] = (), intro: str = ""
) -> Page:
    """The page of an outcome, without the sections that have nothing to say.

    Args:
        outcome: what came of it.
        sections: what there is to say.
        places: where to look, besides those of the outcome.
        intro: a paragraph before the sections.
    """
    return Page(
        title=outcome.title,
        verdict=outcome.verdict,
        good=outcome.verdict.good,
        moved=outcome.verdict.moved,
        lead="" if outcome.verdict.good else outcome.why,
        intro=intro,
        facts=Table(rows=[*outcome.meanwhile, *outcome.places, *places]),
        sections=[section for section in sections if not section.empty],
    )


def decision_section(outcome: Outcome) -> Section:
    """What was decided, and why; where it did not go well, the page begins with the reason."""
    facts = [Table(rows=outcome.facts)] if outcome.facts else []
    table = [Lines(text=outcome.table)] if outcome.table else []
    if outcome.verdict == Ending.REFUSED:
        return Section(title="Decision", blocks=facts, more=table, more_title="All gates")
    return Section(
        title="Decision", blocks=[*([Text(text=outcome.why)] if outcome.verdict.good else []), *table, *facts]
    )


def _intro(files: RunFiles | None) -> str:
    if files is None:
        return ""
    began = files.about.begun[:16].replace("T", " ")
    return f"Run {files.about.flow_run_name}, begun {began} UTC."


def _places(files: RunFiles, bucket: str) -> list[Sequence[Cell]]:
    rows: list[Sequence[Cell]] = []
    if found := files.registered:
        rows += [
            ("MLflow version", Link(text=f"{files.job.name} version {found.version}", url=found.version_url)),
            ("MLflow run", Link(text="parameters, curves, data", url=found.run_url)),
            ("this report", Link(text="with its charts, in MLflow", url=page_of_report(found.run_url))),
        ]
    if files.against is not None:
        rows.append(("release", f"s3://{bucket}/models/{files.job.name}/releases/{files.release}/"))
    return [*rows, ("run directory", str(files.folder))]


# ---- versus what is live


def _versus_live(files: RunFiles) -> Section:
    result, against = files.compared, files.against
    if result is None or against is None:
        return Section(title="Beside the live release", blocks=())
    if not against.live:
        return Section(title="Beside the live release", blocks=[Text(text="Nothing was live to hold it against.")])
    title = f"Beside the live release {against.live}"
    kinds: list[Block] = [Text(text=f"It tells nothing by it: {said}") for said in against.not_understood]
    if against.changes:
        kinds += [Text(text=f"It is {situations.OTHER_KIND}:"), kind_table(against.changes)]
    if result.live_problem:
        said = on_one_line(result.live_problem, LONGEST_SAID)
        return Section(title=title, blocks=[*kinds, Text(text=f"It could not be scored: {said}")])
    job, versus = files.job, VersusLive.of(files.job, result, against.live)
    asked = compare(job, versus)
    decisive = next((item.metric for item in asked if item.asked is Asked.POLICY), None)
    margin = job.release.margin if job.release.policy == "better" else -job.release.margin
    drawn = [
        charts.Span(
            name=name, low=low, high=high, middle=versus.improvement(job, name),
            limit=margin if name == decisive else 0.0,
            passed=all(item.passed for item in asked if item.metric == name),
        )
        for name, (low, high) in versus.intervals.items()
    ]  # fmt: skip
    mine, theirs = {**versus.candidate, **result.candidate_speed}, {**versus.theirs, **result.live_speed}
    rows = [
        (name, number(value), number(theirs.get(name)), interval_text(versus.intervals.get(name)))
        for name, value in mine.items()
    ]
    said = (
        f"Both were downloaded from the bucket and run by one process on the same {result.samples:,} samples. The "
        f"interval is of the improvement: above 0 the candidate is better ({job.release.confidence:.0%}, "
        f"{how_drawn(job, result.groups)})."
    )
    if result.live_inputs:
        said += f" Of the live release: {result.live_inputs}."
    if result.live_speed:
        said += " Times, sizes and memory were measured by turns."
    blocks: list[Block] = [*kinds, Text(text=said)]
    if drawn:
        blocks.append(Chart(title="Improvement over the live release", svg=charts.intervals(drawn)))
    blocks.append(Table(header=("metric", "candidate", "live", "interval of the improvement"), rows=rows))
    blocks += [comparison_table(asked)] if asked else []
    return Section(title=title, blocks=blocks)


def _speed(files: RunFiles) -> Section:
    """Speed of every format, and what the live release recorded of itself when it was made."""
    speed = files.validated.speed if files.validated else None
    if speed is None or files.validated is None:
        return Section(title="Speed", blocks=())
    recorded = files.against.speed if files.against else None
    mine, theirs = _medians(speed), _medians(recorded) if recorded else {}
    batches = sorted({batch for _, batch in mine})
    kinds = list(dict.fromkeys(kind for kind, _ in mine))
    paired = any((kind, batches[0]) in theirs for kind in kinds)
    series = ("candidate", "live") if paired else ("candidate",)
    said = how_measured(speed)
    if recorded and paired:
        said += (
            " The live release's times are what it recorded when it was made, on "
            f"{on_one_line(recorded.machine, LONGEST_MACHINE)}: not measured beside these. A gate with times_live has "
            "both measured by turns."
        )
    blocks: list[Block] = [Text(text=said)]
    for batch in dict.fromkeys(batches[:1] + batches[-1:]):
        rows = [(kind, [side.get((kind, batch)) for side in (mine, theirs)[: len(series)]]) for kind in kinds]
        drawn = charts.bars(rows, series, lambda value: f"{number(value)} ms")
        blocks.append(Chart(title=f"Median of a call at batch {batch}", note="shorter is faster", svg=drawn))
    return Section(title="Speed", blocks=blocks, more=[speed_table(speed, unproven_in_cpp(files.validated.verdicts))])


def _medians(speed: MeasureResult) -> dict[tuple[str, int], float]:
    """Format and batch size to milliseconds of a call."""
    return {(kind, item.batch): item.p50_ms for kind, found in speed.measured.items() for item in found.speeds}


# ---- what it came from


def _lineage(files: RunFiles) -> Section:
    made = files.made_from
    packages = "\n".join(f"{name}=={version}" for name, version in made.packages.items()) if made else ""
    return Section(
        title="Lineage", blocks=[Table(rows=list(_origins(files)))], more=[Lines(text=packages)] if packages else []
    )


def _origins(files: RunFiles) -> Iterator[Sequence[Cell]]:
    about, made, lineage = files.about, files.made_from, files.lineage
    if files.release:
        yield ("release", files.release)
    if files.against is not None:
        yield ("parent release", files.against.live or "none: nothing was live")
    if lineage:
        yield ("started from", lineage.start or "scratch")
    commit = made.git_commit if made else about.git_commit
    yield ("git commit", commit)
    if about.git_commit != commit:
        yield ("git commit of the rest", about.git_commit)
    if made:
        yield ("code", made.code)
    if files.facts is not None:
        yield ("training data", files.facts.train.fingerprint)
        yield ("held-out data", files.facts.validation.fingerprint)
    if about.snapshot:
        yield ("snapshot", about.snapshot)
    if files.trained is not None:
        yield ("samples as trained on", files.trained.data_fingerprint)
    if lineage and "config" in lineage.inputs:
        yield ("configuration", lineage.inputs["config"])
    yield ("job", files.job.digest())
    if made:
        yield ("environment", f"{len(made.packages)} packages, Python {made.packages.get('python', '?')}")
    if about.environments is not None and (two := about.environments.in_words()):
        yield ("two environments", two)
    yield ("flow run", about.flow_run_id)

"""The last page of a run: what was trained, proven, released and spent, wherever people look for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from infra.errors import ShipError
from infra.settings import Settings
from registry.cost import Rates, Spent, read_costs
from registry.decisions import PROMOTED as WENT_LIVE
from registry.keys import release_prefix
from registry.mlflow_versions import attach_report
from registry.page import Cell, Link, markdown
from registry.page_html import html
from registry.reports import put_report
from registry.run_files import RunFiles, read_run
from registry.run_report import Outcome, run_page
from tasks.policy import artifact_key
from tasks.promote import Kept, Promoted
from tasks.register import Registered
from tasks.rehearse import Rehearsed
from tasks.run import Run, close_ledger
from tasks.tell import PROMOTED, tell

REPORT = "report.html"


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


@dataclass(frozen=True, kw_only=True)
class Written:
    """One report, in both forms."""

    title: str
    markdown: str
    html: str
    file: Path | None
    """HTML in the run's folder, with the markdown beside it; None for a run that has no folder."""
    files: RunFiles | None
    """What it was made from."""


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
async def report(run: Run, registered: Registered, promoted: Promoted) -> Shipped:
    """Write the report: for Prefect, for MLflow, beside the release and as files of the run."""
    outcome = decided(run, promoted, title=f"{run.job.name} release {promoted.pointer.release} is live on "
                      f"{promoted.pointer.channel}", why=why_promoted(promoted.rehearsed))  # fmt: skip
    path = await publish(run, registered, promoted.rehearsed, outcome)
    tell(PROMOTED, run.job.name, outcome.title, in_short(run, registered, promoted.rehearsed, promoted))
    return Shipped(
        title=outcome.title,
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


def why_promoted(rehearsed: Rehearsed) -> str:
    """The numbers beside those of the live release."""
    compared = rehearsed.in_words()
    return "; ".join(f"{name}: {said}" for name, said in compared.items()) or "nothing was live"


def decided(
    run: Run, outcome: Promoted | Kept, *, title: str, why: str, asked: Sequence[Sequence[Cell]] = ()
) -> Outcome:
    """How a run ended that came to its end. asked: what retraining decided before it trained."""
    channel = f"s3://{run.settings.bucket}/models/{run.job.name}/channels/{run.job.release.channel}.json"
    page: Sequence[Cell] = ("Prefect run", Link(text=run.flow_run_name, url=run.flow_run_url))
    if isinstance(outcome, Kept):
        stays: Sequence[Cell] = ("stays live", f"{outcome.live} on {channel}")
        return Outcome(verdict="kept", good=True, title=title, why=why, facts=[*asked, stays], places=[page])
    pointer = outcome.pointer
    facts: list[Sequence[Cell]] = [
        ("channel", f"{channel}, generation {pointer.generation}"),
        ("replaces", pointer.previous or "nothing, this is the first"),
        *((name, said) for name, said in pointer.verdicts.items() if name == "approved"),
    ]
    return Outcome(
        verdict=WENT_LIVE,
        good=True,
        title=title,
        why=f"All gates passed; {why}.",
        facts=[*asked, *facts],
        places=[page],
    )


def write_report(outcome: Outcome, folder: Path | None, settings: Settings, costs: Sequence[Spent] = ()) -> Written:
    """Make the report of a run from what its folder tells, and put it there. Writes two files.

    folder: None, or one that is not there, for a run that has none. costs: those of a run that kept nothing else.
    """
    if folder is not None and not folder.is_dir():
        folder = None
    files = read_run(folder) if folder is not None else None
    if files is None and folder is not None:
        costs = costs or read_costs(folder)
    rates = Rates(cpu_hour=settings.cpu_hour_price, gpu_hour=settings.gpu_hour_price, currency=settings.currency)
    page = run_page(outcome, files, rates, settings.bucket, costs)
    written = Written(
        title=outcome.title,
        markdown=markdown(page),
        html=html(page),
        file=folder / REPORT if folder is not None else None,
        files=files,
    )
    if written.file is not None:
        written.file.write_text(written.html)
        written.file.with_suffix(".md").write_text(written.markdown)
    return written


async def publish(run: Run, registered: Registered, rehearsed: Rehearsed, outcome: Outcome) -> Path:
    """Write the report and put it everywhere; the decision stands when one of the places does not answer."""
    close_ledger(run.folder)
    written = await asyncio.to_thread(write_report, outcome, run.folder, run.settings)
    assert written.file is not None, "a run at its end has a folder"
    log, name = get_run_logger(), run.job.name
    await acreate_markdown_artifact(written.markdown, key=f"report-{artifact_key(name)}", description=written.title)
    places = {
        "MLflow": asyncio.to_thread(
            attach_report, registered.version, name, outcome.verdict, outcome.why, written.html, run.settings.mlflow_url
        ),
        "the bucket": asyncio.to_thread(
            put_report, run.store, name, rehearsed.published.release, run.flow_run_id, written.html, datetime.now(UTC)
        ),
    }  # fmt: skip
    for place, ended in zip(places, await asyncio.gather(*places.values(), return_exceptions=True), strict=True):
        if isinstance(ended, ShipError):
            log.warning("the report is not in %s: %s", place, ended)
        elif isinstance(ended, BaseException):
            raise ended
    return written.file


async def show_in_prefect(written: Written, model: str, flow_run: UUID) -> None:
    """As an artifact of a flow run that is over. model: empty when nobody knows."""
    key = f"report-{artifact_key(model)}" if model else "report"
    artifact = ArtifactCreate(
        key=key, type="markdown", description=written.title, data=written.markdown, flow_run_id=flow_run
    )
    async with get_client() as client:
        await client.create_artifact(artifact)

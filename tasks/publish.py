"""The report of a run, made and put wherever people look for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from torchworker.durable import write_durably
from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import put_report
from train_and_ship.registry.cost import FLOW, Rates, Spent, read_costs
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import markdown
from train_and_ship.registry.report.run import Ending, Outcome, run_page
from train_and_ship.registry.run_folder import RunFiles, read_run
from train_and_ship.registry.text import Cell, escaped
from train_and_ship.registry.tracking.pending_reports import keep_report, send_reports
from train_and_ship.registry.tracking.runs import REPORT
from train_and_ship.registry.tracking.versions import attach_report
from train_and_ship.tasks.ledgers import close_ledger
from train_and_ship.tasks.policy import artifact_key, show
from train_and_ship.tasks.results import Registered, Run


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


def replaced(release: str | None) -> str:
    """What a move replaces, in words."""
    return release or "nothing, this is the first"


def waiting(question: str, why: str, live: str, flow_run_id: str, places: Sequence[Sequence[Cell]]) -> Outcome:
    """A run that waits for a person.

    Args:
        question: what is asked.
        why: why it is.
        live: the release that would be replaced; empty when nothing is live.
        flow_run_id: of the flow run that waits.
        places: where to look.
    """
    return Outcome(
        verdict=Ending.WAITS,
        title=question,
        why=why,
        facts=[
            ("would replace", replaced(live)),
            ("answer", f"on the page of the run, or with `ship approve {flow_run_id}`"),
        ],
        places=places,
    )


def write_report(outcome: Outcome, folder: Path | None, settings: Settings, costs: Sequence[Spent] = ()) -> Written:
    """Make the report of a run from what its folder tells, and put it there. Writes two files.

    Args:
        outcome: how the run ended, or that it waits.
        folder: of the run; None, or one that is not there, for a run that has none.
        settings: prices and the bucket's name.
        costs: those to show, when they are not what the folder tells.
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
        write_durably(written.file.with_suffix(".md"), written.markdown.encode())
        # The last: where it is, the run has been reported.
        write_durably(written.file, written.html.encode())
    return written


async def publish(run: Run, registered: Registered, outcome: Outcome) -> Path:
    """Write the report and put it everywhere; the decision stands when one of the places does not answer.

    MLflow gets it later then.
    """
    close_ledger(run.folder)
    release, name, url = registered.manifest.release, run.job.name, run.settings.mlflow_url
    written = await asyncio.to_thread(write_report, outcome, run.folder, run.settings)
    assert written.file is not None, "a run at its end has a folder"
    await show(written.markdown, written.title, name)

    keep_report(run.folder, registered.version, name, outcome.verdict, f"{run.job.release.channel}: {outcome.why}")
    await put({
        # Earlier ones too, which it missed.
        "MLflow": asyncio.to_thread(lambda: list(send_reports(run.folder.parent, url))),
        "the bucket": asyncio.to_thread(put_report, run.store, name, release, run.flow_run_id, written.html),
    })  # fmt: skip
    return written.file


async def publish_question(run: Run, registered: Registered, outcome: Outcome) -> None:
    """Put the report so far in front of a person: in Prefect, in MLflow and in the run's folder.

    What the stages took is in it. What the flow took between them is not, for it goes on; the bucket gets the report of
    what came of it.
    """
    name, url = run.job.name, run.settings.mlflow_url
    costs = [item for item in read_costs(run.folder) if item.stage != FLOW]
    written = await asyncio.to_thread(write_report, outcome, run.folder, run.settings, costs)
    await show(written.markdown, written.title, name)
    await put({"MLflow": asyncio.to_thread(attach_report, registered.version, name, written.html, url)})


async def put(places: Mapping[str, Coroutine[Any, Any, object]]) -> None:
    """A report into every place; one that does not answer is named in the log."""
    for place, ended in zip(places, await asyncio.gather(*places.values(), return_exceptions=True), strict=True):
        if isinstance(ended, ShipError):
            get_run_logger().warning("the report is not in %s: %s", place, ended)
        elif isinstance(ended, BaseException):
            raise ended


def places(run: Run, registered: Registered) -> list[str]:
    """Where to look, a line each."""
    version = registered.version
    return [f"Run: {run.flow_run_url}", f"Report: {version.report_url}", f"Version: {version.version_url}"]


async def show_in_prefect(written: Written, model: str, flow_run: UUID) -> None:
    """As an artifact of a flow run that is over. model: empty when nobody knows."""
    key, title, text = artifact_key("report", model), written.title, written.markdown
    artifact = ArtifactCreate(key=key, type="markdown", description=escaped(title), data=text, flow_run_id=flow_run)
    async with get_client() as client:
        await client.create_artifact(artifact)

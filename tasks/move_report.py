"""Reports of rollbacks, and of promotions of what is in the bucket already."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from prefect.runtime import flow_run

from train_and_ship.infra.errors import ShipError
from train_and_ship.registry.bucket.releases import put_report
from train_and_ship.registry.channels.moves import Target, Verified
from train_and_ship.registry.channels.pointer import ROLLBACK
from train_and_ship.registry.diff import Difference, compare
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.move import move_page
from train_and_ship.registry.report.page import markdown
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.text import Link
from train_and_ship.tasks.publish import put, show
from train_and_ship.tasks.results import Moved, Request, flow_run_page
from train_and_ship.tasks.stage import stage_task


@stage_task("report-move", "report", delays=())
async def report_move(request: Request, verified: Verified, moved: Moved) -> None:
    """Write the report of a channel that has moved: for Prefect, and beside the release. The move stands without it."""
    back = moved.kind == ROLLBACK
    outcome = Outcome(
        verdict=Ending.ROLLED_BACK if back else Ending.PROMOTED,
        title=f"{moved.model} release {moved.release} is live on {moved.channel}",
        why=f"{moved.moved_by}: {moved.reason}",
        facts=[
            ("channel", f"{moved.channel}, generation {moved.generation}, moved at {moved.moved_at}"),
            ("replaces", moved.previous or "nothing, this is the first"),
        ],
        places=_places(request, verified.target),
    )
    changes, problem = await what_changes(request, verified.target)
    page = move_page(outcome, verified, moved.verdicts, changes, problem)
    await show(markdown(page), page.title, moved.model)
    await put({
        "the bucket": asyncio.to_thread(
            put_report, request.channel.store, moved.model, moved.release, moved.flow_run, html(page), datetime.now(UTC)
        ),
    })  # fmt: skip


async def show_question(
    request: Request, verified: Verified, question: str, changes: list[Difference], problem: str
) -> None:
    """Put the report in front of a person who is asked whether the channel may move: in Prefect."""
    live = verified.target.live
    outcome = Outcome(
        verdict=Ending.WAITS,
        title=question,
        why=f"{request.mover.by}: {request.mover.why}",
        facts=[
            ("would replace", live.release if live else "nothing, this is the first"),
            ("answer", f"on the page of the run, or with `ship approve {request.mover.flow_run}`"),
        ],
        places=_places(request, verified.target),
    )
    page = move_page(outcome, verified, verified.verdicts, changes, problem)
    await show(markdown(page), page.title, verified.target.channel.model)


async def what_changes(request: Request, target: Target) -> tuple[list[Difference], str]:
    """From what was live to the target; or nothing and why nobody can tell. Reads the bucket."""
    if target.live is None:
        return [], ""
    try:
        store, model = target.channel.store, target.channel.model
        found = await asyncio.to_thread(compare, store, model, target.live.release, target.release)
    except ShipError as error:
        # A rollback is often away from what is damaged.
        return [], str(error)
    return found, ""


def _places(request: Request, target: Target) -> list[tuple[str, str | Link]]:
    name, run = str(flow_run.get_name()), request.mover.flow_run
    return [
        ("Prefect run", Link(text=name, url=flow_run_page(request.settings, run))),
        ("release", f"s3://{request.settings.bucket}/models/{target.channel.model}/releases/{target.release}/"),
    ]

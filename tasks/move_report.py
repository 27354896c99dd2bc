"""Reports of rollbacks, and of promotions of what is in the bucket already."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from prefect.runtime import flow_run

from train_and_ship.infra.errors import ShipError
from train_and_ship.registry.bucket.catalog import Named
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import put_report
from train_and_ship.registry.channels.pointer import ROLLBACK
from train_and_ship.registry.channels.targets import Target, Verified
from train_and_ship.registry.diff import Difference, compare
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.move import move_page
from train_and_ship.registry.report.page import Page, markdown
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.text import Cell
from train_and_ship.tasks.policy import show
from train_and_ship.tasks.publish import put, replaced, waiting
from train_and_ship.tasks.results import Moved, Request, flow_run_place
from train_and_ship.tasks.stage import stage_task


@stage_task("report-move", "report", delays=())
async def report_move(request: Request, verified: Verified, moved: Moved) -> None:
    """Write the report of a channel that has moved: for Prefect, and beside the release. The move stands without it.

    Args:
        request: who wanted it, and where the services are.
        verified: the release as it was before the move, with what was live then.
        moved: the pointer that was written, with the record of the move.
    """
    outcome = Outcome(
        verdict=Ending.ROLLED_BACK if moved.kind == ROLLBACK else Ending.PROMOTED,
        title=f"{moved.model} release {moved.release} is live on {moved.channel}",
        why=f"{moved.moved_by}: {moved.reason}",
        facts=[
            ("channel", f"{moved.channel}, generation {moved.generation}, moved at {moved.moved_at}"),
            ("replaces", replaced(moved.previous)),
        ],
        places=_places(request, verified.target),
    )
    page = await _shown(outcome, verified, moved.verdicts, *await what_changes(verified))
    written = (moved.model, moved.release, moved.flow_run, html(page))
    await put({"the bucket": asyncio.to_thread(put_report, request.channel.store, *written)})


async def show_question(
    request: Request, verified: Verified, question: str, changes: list[Difference], problem: str
) -> None:
    """Put the report in front of a person who is asked whether the channel may move: in Prefect.

    Args:
        request: who wants it, and why.
        verified: the release that would go live.
        question: title of the report.
        changes: from what is live to the release.
        problem: why nobody can tell them; empty otherwise.
    """
    live, mover = verified.target.live, request.mover
    places = _places(request, verified.target)
    waits = waiting(question, f"{mover.by}: {mover.why}", live.release if live else "", mover.flow_run, places)
    await _shown(waits, verified, verified.verdicts, changes, problem)


async def what_changes(verified: Verified) -> tuple[list[Difference], str]:
    """From what was live to the target; or nothing and why nobody can tell. Reads the bucket.

    Both as they were then, and as whoever says yes believes them to be: by the pointer, and as it was verified.
    """
    target, live = verified.target, verified.target.live
    if live is None:
        return [], ""
    try:
        store, model = target.channel.store, target.channel.model
        before = Named(live.release, live.manifest_sha256)
        after = Named(target.release, verified.manifest.sha256())
        found = await asyncio.to_thread(compare, store, model, before, after)
    except ShipError as error:
        # A rollback is often away from what is damaged.
        return [], str(error)
    return found, ""


async def _shown(
    outcome: Outcome, verified: Verified, checked: Mapping[str, str], changes: list[Difference], problem: str
) -> Page:
    """The page, in Prefect by now. Arguments: as of `move_page`."""
    page = move_page(outcome, verified, checked, changes, problem)
    await show(markdown(page), page.title, verified.target.channel.model)
    return page


def _places(request: Request, target: Target) -> list[Sequence[Cell]]:
    bucket, model = request.settings.bucket, target.channel.model
    return [
        flow_run_place(request.settings, str(flow_run.get_name()), request.mover.flow_run),
        ("release", f"s3://{bucket}/{release_prefix(model, target.release)}"),
    ]

"""The last page of a run: what was trained, proven, released and spent, wherever people look for it."""

from __future__ import annotations

from collections.abc import Sequence

from train_and_ship.infra.prefect_events import PROMOTED
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix
from train_and_ship.registry.channels.rules import APPROVAL, APPROVED, APPROVED_FROM, ASKED_FROM
from train_and_ship.registry.kind import kinds_in
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.text import Cell
from train_and_ship.registry.verdicts import NOT_RUN
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.publish import places, publish, replaced
from train_and_ship.tasks.results import Kept, Promoted, Registered, Rehearsed, Run, Shipped
from train_and_ship.tasks.stage import stage_task

_SHOWN = (APPROVAL, APPROVED, APPROVED_FROM, ASKED_FROM, NOT_RUN)
"""Parts of the record of a move that are no numbers."""


@stage_task("report", delays=())
async def report(run: Run, registered: Registered, promoted: Promoted) -> Shipped:
    """Write the report: for Prefect, for MLflow, beside the release and as files of the run."""
    title = f"{run.job.name} release {promoted.pointer.release} is live on {promoted.pointer.channel}"
    outcome = decided(run, promoted, title=title, why=why_promoted(promoted.rehearsed))
    path = await publish(run, registered, outcome)
    emit(PROMOTED, run.job.name, outcome.title, in_short(run, registered, promoted))
    run.write_timings()
    return Shipped(
        title=outcome.title,
        release=registered.manifest.release,
        run_url=run.flow_run_url,
        version_url=registered.version.version_url,
        release_uri=f"s3://{run.settings.bucket}/{release_prefix(run.job.name, registered.manifest.release)}",
        report=path,
    )


def in_short(run: Run, registered: Registered, outcome: Promoted | Kept) -> str:
    """What people are told."""
    if isinstance(outcome, Kept):
        first = outcome.why
    else:
        replaced = outcome.pointer.previous
        first = f"Replaces {replaced}" if replaced else "The first release"
    compared = [f"{name}: {said}" for name, said in outcome.rehearsed.in_words().items()]
    return "\n".join([first, *compared, *places(run, registered)])


def why_promoted(rehearsed: Rehearsed) -> str:
    """The numbers beside those of the live release."""
    compared = rehearsed.in_words()
    return "; ".join(f"{name}: {said}" for name, said in compared.items()) or "nothing was live"


def decided(
    run: Run, outcome: Promoted | Kept, *, title: str, why: str, asked: Sequence[Sequence[Cell]] = ()
) -> Outcome:
    """How a run ended that came to its end.

    Args:
        run: the run.
        outcome: what became of its candidate.
        title: a line for people.
        why: the numbers that decided.
        asked: what retraining decided before it trained.
    """
    channel = f"s3://{run.settings.bucket}/{pointer_key(run.job.name, run.job.release.channel)}"
    if isinstance(outcome, Kept):
        verdict, facts = Ending.KEPT, [("stays live", f"{outcome.rehearsed.live} on {channel}")]
    else:
        verdict, pointer = Ending.PROMOTED, outcome.pointer
        why = f"All gates {'that were run ' if NOT_RUN in pointer.verdicts else ''}passed; {why}."
        facts = [
            ("channel", f"{channel}, generation {pointer.generation}"),
            ("replaces", replaced(pointer.previous)),
            *((name, said) for name, said in pointer.verdicts.items() if name in _SHOWN),
            *kinds_in(pointer.verdicts).items(),
        ]
    return Outcome(verdict=verdict, title=title, why=why, facts=[*asked, *facts], places=[run.place])

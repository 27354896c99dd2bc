"""The last page of a run: what was trained, proven, released and spent, wherever people look for it."""

from __future__ import annotations

from collections.abc import Sequence

from train_and_ship.infra.prefect_events import PROMOTED, ROLLOUT
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix
from train_and_ship.registry.channels.rules import APPROVAL, APPROVED, APPROVED_FROM, ASKED_FROM
from train_and_ship.registry.kind import kinds_in
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.rollouts.record import Rollout, percent
from train_and_ship.registry.text import Cell
from train_and_ship.registry.verdicts import NOT_RUN
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.publish import places, publish, replaced
from train_and_ship.tasks.results import (
    Concluded,
    Kept,
    Promoted,
    Registered,
    Rehearsed,
    RollingOut,
    Run,
    Shipped,
    Waiting,
)
from train_and_ship.tasks.stage import stage_task

_SHOWN = (APPROVAL, APPROVED, APPROVED_FROM, ASKED_FROM, NOT_RUN)
"""Parts of the record of a move that are no numbers."""


@stage_task("report", delays=())
async def report(run: Run, registered: Registered, concluded: Concluded) -> Shipped:
    """Write the report: for Prefect, for MLflow, beside the release and as files of the run."""
    outcome = decided(run, concluded, title=headline(run, registered, concluded), why=why_promoted(concluded.rehearsed))
    path = await publish(run, registered, outcome)
    live = isinstance(concluded, Promoted)
    emit(PROMOTED if live else ROLLOUT, run.job.name, outcome.title, in_short(run, registered, concluded))
    run.write_timings()
    return Shipped(
        title=outcome.title,
        state="" if live else outcome.verdict.capitalize(),
        release=registered.manifest.release,
        run_url=run.flow_run_url,
        version_url=registered.version.version_url,
        release_uri=f"s3://{run.settings.bucket}/{release_prefix(run.job.name, registered.manifest.release)}",
        report=path,
    )


def headline(run: Run, registered: Registered, concluded: Concluded) -> str:
    """What became of a candidate that no gate refuses, in a line."""
    release, channel = f"{run.job.name} release {registered.manifest.release}", run.job.release.channel
    if isinstance(concluded, RollingOut):
        return f"{release} is being rolled out on {channel}: {_share(concluded.rollout)}"
    if isinstance(concluded, Waiting):
        return f"{release} waits for the end of another rollout on {channel}"
    return f"{release} is live on {channel}"


def _share(rollout: Rollout) -> str:
    asked = "asked beside" if rollout.shadow else "answers"
    return f"{asked} {percent(rollout.share)} of the requests, step {rollout.step + 1} of {len(rollout.steps)}"


def in_short(run: Run, registered: Registered, outcome: Concluded | Kept) -> str:
    """What people are told."""
    if isinstance(outcome, Kept | Waiting):
        first = outcome.why
    elif isinstance(outcome, RollingOut):
        first = f"Beside {outcome.rehearsed.live}; `ship rollout {run.job.name} --stop --why …` ends it"
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
    run: Run, outcome: Concluded | Kept, *, title: str, why: str, asked: Sequence[Sequence[Cell]] = ()
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
    elif isinstance(outcome, Waiting):
        verdict, why = Ending.STAGED, f"All gates passed. {outcome.why}"
        facts = [("stays live", f"{outcome.rehearsed.live} on {channel}")]
    elif isinstance(outcome, RollingOut):
        rollout = outcome.rollout
        verdict, why = Ending.ROLLING_OUT, f"All gates passed; {why}. It {_share(rollout)}."
        facts = [
            ("stays live meanwhile", f"{outcome.rehearsed.live} on {channel}"),
            ("steps", f"{', '.join(map(percent, rollout.steps))}, each for {rollout.every:,} s, by {rollout.key}"),
            ("undecided, and given up, after", rollout.deadline),
            *((name, said) for name, said in rollout.verdicts.items() if name in _SHOWN),
            *kinds_in(rollout.verdicts).items(),
        ]
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

"""The end of a retraining run: the report, the record of the decision, and the name under which the run ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from train_and_ship.infra import prefect_events
from train_and_ship.registry.channels.decisions import KEPT, PROMOTED, ROLLING_OUT, STAGED, Decision, record_decision
from train_and_ship.registry.text import Cell
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.publish import publish
from train_and_ship.tasks.report import decided, headline, in_short, why_promoted
from train_and_ship.tasks.results import (
    Concluded,
    Kept,
    Promoted,
    Registered,
    RetrainPlan,
    RetrainResult,
    RollingOut,
    Run,
)
from train_and_ship.tasks.stage import stage_task


@stage_task("conclude")
async def conclude(plan: RetrainPlan, run: Run, registered: Registered, outcome: Concluded | Kept) -> RetrainResult:
    """Record the decision and write the report: for Prefect, for MLflow, beside the release and as files of the run.

    Args:
        plan: what was to be done, and why.
        run: the run that did it.
        registered: its release and its version in MLflow.
        outcome: what became of it.
    """
    made = {"candidate": registered.manifest.release, "version": registered.version.version}
    if isinstance(outcome, Kept):
        event, decision = prefect_events.KEPT, plan.decided(KEPT, outcome.why, **made)
        title = (
            f"{plan.job.name}: release {decision.live} stays live on {decision.channel}; release {decision.candidate} "
            f"is the challenger (version {decision.mlflow_version})"
        )
    else:
        title = headline(run, registered, outcome)
        if isinstance(outcome, Promoted):
            event, verdict, why = prefect_events.PROMOTED, PROMOTED, why_promoted(outcome.rehearsed)
        elif isinstance(outcome, RollingOut):
            event, verdict, why = prefect_events.ROLLOUT, ROLLING_OUT, why_promoted(outcome.rehearsed)
        else:
            event, verdict, why = prefect_events.ROLLOUT, STAGED, outcome.why
        decision = plan.decided(verdict, why, **made)
    await asyncio.to_thread(record_decision, plan.channel.store, decision, run.folder)
    ended = decided(run, outcome, title=title, why=decision.why, asked=_asked(plan, decision))
    path = await publish(run, registered, ended)
    emit(event, run.job.name, title, in_short(run, registered, outcome))
    run.write_timings()
    return RetrainResult(
        title=title,
        decision=decision,
        run_url=run.flow_run_url,
        version_url=registered.version.version_url,
        report=path,
    )


def _asked(plan: RetrainPlan, decision: Decision) -> Sequence[Sequence[Cell]]:
    return [
        ("asked by", decision.asked),
        ("changed", "; ".join(f"{name}: {how}" for name, how in plan.changed.items()) or "nothing"),
        ("started from", f"the weights of release {decision.start}" if decision.start else "scratch"),
        ("decision", decision.decision),
    ]

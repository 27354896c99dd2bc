"""The last word of a night: the report, the record of the decision, and the name under which the run ends."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from infra.errors import ShipError
from registry.decisions import KEPT, PROMOTED, Decision, record_decision
from registry.description import table
from registry.mlflow_versions import attach_report
from tasks import tell as tell_event
from tasks.decide import Night, Plan
from tasks.policy import artifact_key, worth_retrying
from tasks.promote import Kept, Promoted
from tasks.register import Registered
from tasks.rehearse import Rehearsed
from tasks.report import in_short, render
from tasks.run import Run
from tasks.train import Trained


@task(
    name="conclude",
    task_run_name="conclude",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=[1, 2, 5, 15],
    retry_condition_fn=worth_retrying,
)
async def conclude(
    plan: Plan, run: Run, trained: Trained, registered: Registered, rehearsed: Rehearsed, outcome: Promoted | Kept
) -> Night:
    """Write the report (Prefect artifact, file of the run, file of the MLflow run) and record the decision."""
    decision = _decision(plan, registered, outcome)
    title = _title(plan, decision)
    markdown = render(run, trained, registered, rehearsed, outcome, title=title, asked=_asked(plan, decision))
    path = run.folder / "report.md"
    path.write_text(markdown)
    await asyncio.to_thread(record_decision, plan.store, decision)
    await acreate_markdown_artifact(markdown, key=f"report-{artifact_key(run.job.name)}", description=title)
    try:
        await asyncio.to_thread(
            attach_report, registered.version, run.job.name, decision.decision, decision.why, markdown,
            run.settings.mlflow_url,
        )  # fmt: skip
    except ShipError as error:
        # The decision stands; MLflow is told what it is when it can be.
        get_run_logger().warning("the report is not in MLflow: %s", error)
    told = tell_event.PROMOTED if decision.decision == PROMOTED else tell_event.KEPT
    tell_event.tell(told, run.job.name, title, in_short(run, registered, rehearsed, outcome))
    run.write_timings()
    return Night(
        title=title,
        decision=decision,
        run_url=run.flow_run_url,
        version_url=registered.version.version_url,
        report=path,
    )


def _decision(plan: Plan, registered: Registered, outcome: Promoted | Kept) -> Decision:
    made = {"candidate": registered.manifest.release, "version": registered.version.version}
    if isinstance(outcome, Kept):
        return plan.decided(KEPT, outcome.why, **made)
    compared = outcome.rehearsed.in_words()
    why = "; ".join(f"{name}: {said}" for name, said in compared.items()) or "nothing was live"
    return plan.decided(PROMOTED, why, **made)


def _title(plan: Plan, decision: Decision) -> str:
    if decision.decision == PROMOTED:
        return f"{plan.job.name} release {decision.candidate} is live on {decision.channel}"
    return (
        f"{plan.job.name}: release {decision.live} stays live on {decision.channel}; release {decision.candidate} is "
        f"the challenger (version {decision.mlflow_version})"
    )


def _asked(plan: Plan, decision: Decision) -> str:
    rows = [
        ("asked by", decision.asked),
        ("changed", "; ".join(f"{name}: {how}" for name, how in plan.changed.items()) or "nothing"),
        ("started from", f"the weights of release `{decision.start}`" if decision.start else "scratch"),
        ("decision", decision.decision),
        ("why", decision.why),
    ]
    return f"## Decision\n\n{table(('what', 'value'), rows)}"

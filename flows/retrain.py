"""Retraining: train when there is something new, and put live what is better."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow
from prefect.client.schemas.objects import State

from train_and_ship.tasks.approval import candidate_approval
from train_and_ship.tasks.catch_up import catch_up
from train_and_ship.tasks.conclude import conclude
from train_and_ship.tasks.decide import decide, ended, skip
from train_and_ship.tasks.exclusive import exclusive
from train_and_ship.tasks.export import export
from train_and_ship.tasks.inspect import inspect
from train_and_ship.tasks.naming import GateError, refused, run_name
from train_and_ship.tasks.outcome import end_mlflow_run, record_failure, report_failure
from train_and_ship.tasks.promote import promote_if_better
from train_and_ship.tasks.register import register
from train_and_ship.tasks.rehearse import rehearse
from train_and_ship.tasks.results import RetrainResult, RunId
from train_and_ship.tasks.run import begin
from train_and_ship.tasks.train import train
from train_and_ship.tasks.validate import validate


@flow(
    name="retrain",
    flow_run_name=run_name,
    on_failure=[report_failure, end_mlflow_run, record_failure],
    on_crashed=[report_failure, end_mlflow_run, record_failure],
    on_cancellation=[report_failure, record_failure],
)
async def retrain(
    job: str = "examples/digits/job.yaml",
    why: str = "",
    force: bool = False,
    resume: RunId = "",
    allow: Sequence[str] = (),
) -> State[RetrainResult]:
    """Train again when code, data, job or environment changed, and promote what is better than the live release.

    `job` is the path of a job file, `why` is for the record, `force` trains although nothing changed, `resume` is the
    id of an earlier run to go on with, and `allow` says in what the candidate may be of another kind than what is live,
    this once: signature, labels, formats, model, live_score, runtime. The run ends as Skipped, Promoted, Staged (on a
    channel that is not `prod`), Kept, or as Refused when a gate fails, with the reason; where the job says
    `release.rollout`, as Rolling out, or Staged while another rollout is running.
    """
    try:
        async with exclusive(job, resume) as job_file:
            await catch_up(resume)
            plan = await decide(job_file, why, force, resume, allow)
            if plan.skip:
                return ended(await skip(plan))
            run = await begin(plan.job_file, resume, allow)
            inspected = await inspect(run)
            trained = await train(run, inspected, plan.start)
            exported = await export(run, inspected, trained)
            validated = await validate(run, trained, exported)
            registered = await register(run, inspected, trained, validated)
            rehearsed = await rehearse(run, registered)
            answer = await candidate_approval(run, registered, rehearsed)
            outcome = await promote_if_better(run, registered, rehearsed, answer)
            return ended(await conclude(plan, run, registered, outcome))
    except GateError as error:
        return refused(error)

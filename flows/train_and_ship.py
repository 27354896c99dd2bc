"""From code to a serving bucket."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow
from prefect.client.schemas.objects import State

from train_and_ship.tasks.approval import candidate_approval
from train_and_ship.tasks.exclusive import exclusive
from train_and_ship.tasks.export import export
from train_and_ship.tasks.inspect import inspect
from train_and_ship.tasks.naming import GateError, refused, run_name, went_live
from train_and_ship.tasks.outcome import end_mlflow_run, report_failure
from train_and_ship.tasks.promote import promote
from train_and_ship.tasks.register import register
from train_and_ship.tasks.rehearse import rehearse
from train_and_ship.tasks.report import report
from train_and_ship.tasks.results import RunId, Shipped
from train_and_ship.tasks.run import begin
from train_and_ship.tasks.train import train
from train_and_ship.tasks.validate import validate


@flow(
    name="train-and-ship",
    flow_run_name=run_name,
    on_failure=[report_failure, end_mlflow_run],
    on_crashed=[report_failure, end_mlflow_run],
    on_cancellation=[report_failure],
)
async def train_and_ship(
    job: str = "examples/digits/job.yaml", resume: RunId = "", allow: Sequence[str] = ()
) -> State[Shipped]:
    """Train a model, prove its exports equal to it, and put it live.

    `job` is the path of a job file; `resume` the id of an earlier run of it to go on with; `allow` says in what the
    release may be of another kind than what is live, this once: signature, labels, formats, model, live_score, runtime.
    The run ends as Promoted, or Staged on a channel that is not `prod`, or as Refused when a gate fails; where the job
    says `release.rollout`, as Rolling out, or Staged while another rollout is running.
    """
    try:
        async with exclusive(job, resume) as job_file:
            run = await begin(job_file, resume, allow)
            inspected = await inspect(run)
            trained = await train(run, inspected)
            exported = await export(run, inspected, trained)
            validated = await validate(run, trained, exported)
            registered = await register(run, inspected, trained, validated)
            rehearsed = await rehearse(run, registered)
            answer = await candidate_approval(run, registered, rehearsed)
            concluded = await promote(run, registered, rehearsed, answer)
            shipped = await report(run, registered, concluded)
            return went_live(shipped, shipped.title, run.job.release.channel, shipped.state)
    except GateError as error:
        return refused(error)

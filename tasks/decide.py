"""The first question of a retraining run: is there anything new to train on?"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from torchworker.durable import write_durably
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_events import UNCHANGED
from train_and_ship.infra.provenance import asked_by
from train_and_ship.infra.rundir import read_kept, run_folder
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import Named
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import (
    FAILED,
    KEPT,
    PROMOTED,
    ROLLING_OUT,
    SKIPPED,
    STAGED,
    Decision,
    decided_at,
    keep_until_recorded,
    read_decisions,
    record_decision,
    record_waiting,
)
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer, read_pointer
from train_and_ship.registry.cost import read_costs
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import require_kinds
from train_and_ship.registry.lineage import Inputs, changes, recorded_files
from train_and_ship.registry.made_of import files_now
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.rollouts.moves import running
from train_and_ship.registry.rollouts.record import percent
from train_and_ship.registry.rollouts.versions import read_versions
from train_and_ship.registry.text import Cell
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.fingerprints import data_fingerprint, inputs_of, project_hashes, snapshot_fingerprint
from train_and_ship.tasks.inspect import read_facts
from train_and_ship.tasks.ledgers import close_ledger, ledger_of
from train_and_ship.tasks.naming import went_live
from train_and_ship.tasks.outcome import CUT_OFF
from train_and_ship.tasks.policy import show
from train_and_ship.tasks.publish import write_report
from train_and_ship.tasks.requests import project_of
from train_and_ship.tasks.results import JobFile, RetrainPlan, RetrainResult, flow_run_page, flow_run_place
from train_and_ship.tasks.rooms import Rooms
from train_and_ship.tasks.snapshot import known_snapshot
from train_and_ship.tasks.stage import stage_task

PLAN = "plan.json"
INPUTS = ("code", "data", "config", "environment")
LOOK_BACK = 30
"""Decisions among which an answer to the same question is looked for."""
STREAK = 7
"""People are told when so many skips have followed each other, and of each multiple."""


@stage_task("decide")
async def decide(job_file: JobFile, why: str, force: bool, resume: str, allow: Sequence[str] = ()) -> RetrainPlan:
    """Compare code, data, job and environment with those of the live release.

    Writes the run's own folder, and earlier answers that the bucket could not take. A run that goes on keeps to what it
    decided first.

    Args:
        job_file: what is to be trained.
        why: who asks, for the record.
        force: train although nothing has changed.
        resume: id of an earlier run to go on with; empty for a new one.
        allow: as of `begin`.

    Raises:
        JobError: the job cannot be used.
        RequestError: there is no such kind.
    """
    began = time.monotonic()
    require_kinds(allow)
    job = job_file.job.unattended()
    settings = Settings.load()
    channel = Channel(ObjectStore.from_settings(settings), job.name, job.release.channel, settings.mlflow_url)
    flow_run_id = str(flow_run.get_id())
    folder = run_folder(settings.runs / job.name, flow_run_id, resume)
    hold(folder)
    with ledger_of(folder).stage("decide"):
        if waiting := await asyncio.to_thread(record_waiting, channel.store, settings.runs / job.name, folder):
            get_run_logger().info("%s: %d earlier answers are in the bucket now", job.name, waiting)
        live, (read_seconds, inputs) = await asyncio.gather(
            asyncio.to_thread(read_pointer, channel),
            _inputs(settings, job_file, folder),
        )
    earlier = _read_plan(folder)
    start = live if job.retrain.start == "live" else None
    if earlier is not None:
        live, start = earlier
    now = _Now(channel, settings, job, job_file.project, inputs, job_file.interpreter)
    changed, inputs = await asyncio.to_thread(now.changes, Named(live.release, live.manifest_sha256) if live else None)
    digest = inputs.digest(start.release if start else "", {*job.release.allow, *allow})
    skip = ""
    if earlier is None and not force:
        skip = await asyncio.to_thread(_reason_to_skip, now, live, changed, digest)
    plan = RetrainPlan(
        job_file=replace(job_file, job=job),
        channel=channel,
        settings=settings,
        flow_run_id=flow_run_id,
        asked=asked_by(why),
        live=live,
        changed=changed,
        inputs=digest,
        skip=skip,
        start=start,
        began=began,
        read_seconds=read_seconds,
    )
    if not skip:
        _write_plan(folder, live, start)
        # Whoever is killed says nothing any more: the next run of the model does.
        keep_until_recorded(folder, plan.decided(FAILED, CUT_OFF))
    what = "; ".join(f"{name}: {how}" for name, how in changed.items()) or "nothing has changed"
    where = f"the weights of release {start.release}" if start else "scratch"
    get_run_logger().info("%s: %s", job.name, skip or f"trains, from {where}; {what}")
    return plan


async def _inputs(settings: Settings, job_file: JobFile, folder: Path) -> tuple[float, Inputs]:
    """Seconds that reading the data took, and the fingerprints. A snapshot is known without being read."""
    job, project_folder, interpreter = job_file.job, job_file.project, job_file.interpreter
    if snapshot := await asyncio.to_thread(known_snapshot, settings, job, project_folder):
        return 0.0, await inputs_of(
            settings, job, project_folder, snapshot_fingerprint(snapshot), interpreter=interpreter
        )
    # It imports torch while this process talks to the bucket.
    server = Rooms(interpreter, folder.parent / "host.log").project
    facts = await read_facts(server, job, project_of(job, project_folder), folder)
    samples = {"train": facts.train.samples, "validation": facts.validation.samples}
    return facts.seconds, await inputs_of(settings, job, project_folder, data_fingerprint(facts), samples, interpreter)


@dataclass(frozen=True)
class _Now:
    """What a release would be made of now, to be held against releases that there are."""

    channel: Channel
    settings: Settings
    job: Job
    project: Path
    inputs: Inputs
    interpreter: Interpreter

    def changes(self, named: Named | None) -> tuple[dict[str, str], Inputs]:
        """How that release differs, and the inputs with the files that it has opened, as these are now. named: None
        when nothing is live."""
        if named is None:
            return {"live": f"nothing is live on {self.channel.name}"}, self.inputs
        release, sha256 = named.release, named.manifest_sha256 or None
        try:
            record = read_release_record(self.channel.store, self.channel.model, release, sha256=sha256)
        except ReleaseError as error:
            return {"live": f"release {release} is broken: {on_one_line(str(error))}"}, self.inputs
        inputs = self.inputs
        try:
            with record.understood():
                if (before := recorded_files(record)) is not None:
                    hashes = project_hashes(self.settings, self.project)
                    files = files_now(before, inputs.files, self.project, hashes, self.interpreter.sites)
                    inputs = replace(inputs, files=files)
                return changes(inputs, self.job, record, self.project), inputs
        except ReleaseError as error:
            return {"live": f"release {release} is broken: {on_one_line(str(error))}"}, inputs


def _reason_to_skip(now: _Now, live: Pointer | None, changed: Mapping[str, str], inputs: str) -> str:
    """Why training would find nothing new; empty when it may."""
    if live is None:
        return ""
    if not changed:
        return f"nothing has changed since release {live.release}: code, data, config and environment are the same"
    for decision in reversed(read_decisions(now.channel, LOOK_BACK)):
        known = decision.decision in (KEPT, ROLLING_OUT, STAGED)
        if known and (decision.inputs, decision.live) == (inputs, live.release):
            if decision.decision == STAGED and running(now.channel) is None:
                # It waited for another one's rollout, which is over.
                return ""
            # It may have opened other files than the live release. One that is gone or broken tells nothing.
            # It was not live, and no record says how it was described.
            since, _ = now.changes(Named(decision.candidate))
            if since.keys() - {"live"}:
                return ""
            return (
                f"the same code, data, config and environment were tried at {decided_at(decision):%Y-%m-%d %H:%M} UTC "
                f"(release {decision.candidate}), and {_came_of(now.channel, decision)}"
            )
    return ""


def _came_of(channel: Channel, decision: Decision) -> str:
    """What became of a candidate that is not live."""
    if decision.decision == ROLLING_OUT:
        rollout = next((one for one in read_versions(channel, LOOK_BACK) if one.release == decision.candidate), None)
        if rollout is not None and rollout.is_running:
            return f"it is being rolled out: {percent(rollout.share)} of the requests"
        if rollout is not None:
            return f"its rollout has ended, {rollout.outcome.value}: {on_one_line(rollout.reason)}"
    return f"release {decision.live} stayed: {on_one_line(decision.why)}"


def _read_plan(folder: Path) -> tuple[Pointer | None, Pointer | None] | None:
    """What was live, and where training began, when this run was first begun; None when it was not."""

    def decode(content: bytes) -> tuple[Pointer | None, Pointer | None]:
        said = json.loads(content)
        live, start = (decode_pointer(said[name].encode(), PLAN) if said[name] else None for name in ("live", "start"))
        return live, start

    return read_kept(folder / PLAN, decode)


def _write_plan(folder: Path, live: Pointer | None, start: Pointer | None) -> None:
    texts = {name: pointer.encode().decode() if pointer else "" for name, pointer in (("live", live), ("start", start))}
    write_durably(folder / PLAN, json.dumps(texts).encode())


@stage_task("skip")
async def skip(plan: RetrainPlan) -> RetrainResult:
    """Record that nothing was done, and why."""
    decision = replace(plan.decided(SKIPPED, plan.skip), streak=1 + await asyncio.to_thread(streak, plan))
    await asyncio.to_thread(record_decision, plan.channel.store, decision)
    page = flow_run_page(plan.settings, plan.flow_run_id)
    title = f"{plan.job.name}: skipped, {plan.skip}"
    if decision.streak % STREAK == 0:
        subject = f"{plan.job.name}: skipped {decision.streak} times in a row"
        emit(UNCHANGED, plan.job.name, subject, f"{plan.skip}\nRun: {page}")
    folder = plan.settings.runs / plan.job.name / plan.flow_run_id
    close_ledger(folder)
    costs = read_costs(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    written = await asyncio.to_thread(write_report, _skipped(plan, decision, title), folder, plan.settings, costs)
    await show(written.markdown, title, plan.job.name)
    return RetrainResult(title=title, decision=decision, run_url=page, report=written.file)


def streak(plan: RetrainPlan) -> int:
    """How many times in a row the answer was to skip, before this one."""
    last = read_decisions(plan.channel, 1)
    return last[-1].streak if last else 0


def ended(result: RetrainResult) -> State[RetrainResult]:
    """The state in which a flow run ends: Completed, under the name of what was decided, with the reason."""
    decision = result.decision
    if decision.decision == PROMOTED:
        return went_live(result, result.title, decision.channel)
    return Completed(name=decision.decision.capitalize(), message=result.title, data=result)


def _skipped(plan: RetrainPlan, decision: Decision, title: str) -> Outcome:
    """The report of a retraining run in which nothing was done."""
    facts: list[Sequence[Cell]] = [(name, plan.changed.get(name, "unchanged")) for name in INPUTS]
    facts += [
        ("live", f"{decision.live} on {decision.channel}"),
        ("asked by", decision.asked),
        ("seconds", f"{decision.seconds:.1f}, of which {plan.read_seconds:.1f} were reading the data"),
        ("in a row", f"{decision.streak}"),
    ]
    place = flow_run_place(plan.settings, plan.flow_run_id, plan.flow_run_id)
    why = f"Nothing was trained: {plan.skip}."
    return Outcome(verdict=Ending.SKIPPED, title=title, why=why, facts=facts, places=[place])

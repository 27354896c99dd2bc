"""What the stages hand on to each other and to the flows: plain values, made once by the stage that is named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from torchworker.contract import (
    CppResult,
    ExportResult,
    InspectResult,
    Project,
    RehearseResult,
    TrainResult,
    ValidateResult,
)
from train_and_ship.infra.interpreter import Interpreter, our_interpreter
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.rundir import COMPLETED, RUN_ID
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import Published
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import Decision, Verdict
from train_and_ship.registry.channels.moves import BY_JOB, BY_REQUEST, Mover
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.rules import APPROVAL, APPROVED, APPROVED_FROM, ASKED_FROM
from train_and_ship.registry.cost import FLOW, Ledger, Meter, read_costs
from train_and_ship.registry.gates import VersusLive, require_good_enough, require_not_slower, worst
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import KindChange, in_words, not_allowed
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.registry.run_folder import MadeFrom
from train_and_ship.registry.text import Cell, Link, interval_text, number
from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.versions import RegisteredVersion
from train_and_ship.tasks.at_work import at_work
from train_and_ship.tasks.rooms import Rooms

RunId = Annotated[str, Field(pattern=f"^({RUN_ID})?$")]
"""The id of an earlier run, as Prefect's forms and deployments check it; empty for none."""


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A job file as it was when it was read, once, before anything else."""

    job: Job
    project: Path
    """Absolute path of the project folder."""
    interpreter: Interpreter = field(default_factory=our_interpreter)
    """What runs the code of the job."""
    hint: str = ""
    """Why it is not the project's own, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage needs to know."""

    job: Job
    project: Project
    snapshot: str
    """Hexadecimal SHA-256 of the manifest of the job's data; empty when the job has no snapshot."""
    settings: Settings
    folder: Path
    """Run directory: one folder a stage, kept when a run is retried."""
    flow_run_id: str
    origin: str
    """Id of the flow run that began it, by which MLflow knows it: a retry keeps its id, `--resume` has a new one."""
    begun: str
    """When it was first begun, UTC, ISO 8601: what is live and was begun later is newer."""
    flow_run_name: str
    git_commit: str
    rooms: Rooms
    store: ObjectStore
    live: LiveRun
    """The run in MLflow, fed while this one goes on."""
    cpp: Mapping[str, Future[CppResult]]
    """The C++ runner, being looked for or built, by the path of the interpreter whose torch it is built against; empty
    when the job has no use for it."""
    ledger: Ledger
    allow: Sequence[str] = ()
    """In which kinds the candidate may differ from what is live, this once."""

    @property
    def allowed(self) -> dict[str, str]:
        """Kind to how it is allowed, for good and once."""
        return {**dict.fromkeys(self.job.release.allow, BY_JOB), **dict.fromkeys(self.allow, BY_REQUEST)}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[Meter]:
        """Add what the block takes to the stage's cost; a silent run says that it is at it."""
        with at_work(stage), self.ledger.stage(stage) as meter:
            yield meter

    def write_timings(self) -> Path:
        """`timings.json` in the run directory: seconds by stage, over all attempts."""
        path = self.folder / COMPLETED
        stages = {item.stage: item.wall for item in read_costs(self.folder) if item.stage != FLOW and item.wall}
        path.write_text(json.dumps({"stages": stages}, indent=1))
        return path

    @property
    def channel(self) -> Channel:
        """The one that the job's release is for."""
        return Channel(self.store, self.job.name, self.job.release.channel, self.settings.mlflow_url)

    @property
    def place(self) -> Sequence[Cell]:
        """Where to look: its page in Prefect."""
        return flow_run_place(self.settings, self.flow_run_name, self.flow_run_id)

    @property
    def flow_run_url(self) -> str:
        """Where Prefect shows it."""
        return flow_run_page(self.settings, self.flow_run_id)


def flow_run_page(settings: Settings, flow_run_id: str) -> str:
    """Where Prefect shows a flow run."""
    return f"{settings.prefect_ui_url}/runs/flow-run/{flow_run_id}"


def flow_run_place(settings: Settings, name: str, flow_run_id: str) -> Sequence[Cell]:
    """The page of a flow run, as reports list where to look."""
    return "Prefect run", Link(text=name, url=flow_run_page(settings, flow_run_id))


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """The data as it was before training; being read still when nothing hangs on it yet."""

    reading: asyncio.Task[InspectResult]

    async def facts(self) -> InspectResult:
        """Raises what reading raises: JobError, WorkerError."""
        return await asyncio.shield(self.reading)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A complete training stage."""

    folder: Path
    result: TrainResult
    digest: str
    start: str
    """The release whose weights it began with; empty when it began from scratch."""
    made_from: MadeFrom
    """As it was when training started: a retry may run on a later commit, and what is changed meanwhile was not
    trained."""

    @property
    def weights(self) -> Path:
        """The file of the trained weights."""
        return self.folder / self.result.weights


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A complete export stage."""

    folder: Path
    result: ExportResult
    digest: str
    weights: Path
    """What every format was made of."""

    @property
    def formats(self) -> dict[str, str]:
        """Format to file name."""
        return {kind: artifact.file for kind, artifact in self.result.artifacts.items()}


def kept_formats(exported: Exported, result: ValidateResult) -> dict[str, str]:
    """Format to file name, without the variants that were dropped so far."""
    dropped = {kind for kind, found in result.int8.items() if found.reason}
    return {kind: file for kind, file in exported.formats.items() if kind not in dropped}


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A candidate that passed every gate that it can be held against alone."""

    job: Job
    exported: Exported
    result: ValidateResult
    digest: str

    @property
    def quality(self) -> dict[str, float]:
        """Each metric at its worst over the formats: any of them may be the one that serves."""
        return worst(self.job, self.result.metrics)

    @property
    def dropped(self) -> dict[str, str]:
        """Int8 variants that are not in the release, and why."""
        return {kind: found.reason for kind, found in self.result.int8.items() if found.reason}

    @property
    def formats(self) -> dict[str, str]:
        """Format to file name, of what passed."""
        return kept_formats(self.exported, self.result)

    @property
    def serve(self) -> dict[str, str]:
        """`latency` and `throughput` to the format that is recommended; empty when none is."""
        return dict(self.result.speed.serve) if self.result.speed else {}


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A release on disk and its version in MLflow."""

    validated: Validated
    folder: Path
    manifest: Manifest
    version: RegisteredVersion
    description: str


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """A candidate that is in the bucket and was tried from there."""

    job: Job
    published: Published
    result: RehearseResult
    live: str
    """The release that it was held against; empty when nothing was live."""
    changes: Sequence[KindChange] = ()
    """What makes it another kind of thing than that release."""
    allowed: Mapping[str, str] = field(default_factory=dict)
    """Kind of change to how it is allowed."""

    @property
    def quality(self) -> dict[str, float]:
        """Each metric of the candidate at its worst over the formats."""
        return worst(self.job, self.result.candidate)

    @property
    def live_quality(self) -> dict[str, float]:
        """The same of the live release, on the same samples."""
        return worst(self.job, self.result.live)

    def require_good_enough(self) -> None:
        """Raises GateError when the live release is better than the job's gates and `release.policy` allow, or could
        not be measured."""
        # A run that was killed after the pointer moved finds its own release there.
        if self.live and self.live != self.published.release:
            result = self.result
            require_good_enough(self.job, self.versus_live)
            require_not_slower(self.job, result.candidate_speed, result.live_speed, self.live, result.speed_problem)

    @property
    def asks_consent(self) -> str:
        """A sentence about what a yes allows besides, for whoever is asked; empty when that is nothing."""
        return consent(not_allowed(self.changes, self.allowed))

    @property
    def versus_live(self) -> VersusLive:
        """The quality of both."""
        return VersusLive.of(self.job, self.result, self.live)

    def in_words(self) -> dict[str, str]:
        """What was compared, for the record of the move."""
        versus = self.versus_live
        mine = {**versus.candidate, **self.result.candidate_speed}
        theirs = {**versus.theirs, **self.result.live_speed}
        found = {}
        for name, value in mine.items():
            if name in theirs:
                span = interval_text(versus.intervals.get(name))
                found[f"{name} vs live"] = f"{number(value)} against {number(theirs[name])}" + (
                    f", {self.job.release.confidence:.0%} interval of the improvement {span}" if span else ""
                )
        return {**found, **in_words(self.changes, self.allowed)}


def consent(kinds: Sequence[str]) -> str:
    """What a person's yes allows. kinds: of change, that nothing else allows."""
    return f"A yes also allows that it is of another kind than what is live: {', '.join(kinds)}." if kinds else ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What somebody said."""

    approved: bool
    said: str
    """By whom, as they say themselves, and why: `by someone said to be grace: looks good`."""
    account: str = ""
    """The account that `ship approve` ran under; empty where nobody knows it."""
    asked_from: str = ""
    """The account of whoever asked for the move; empty where nobody knows it."""
    required: str = ""
    """By what a person had to be asked, in words."""

    def in_words(self) -> dict[str, str]:
        """For the record of a move: what was required, who is said to have said yes, and what is known."""
        known = {APPROVED_FROM: self.account, ASKED_FROM: self.asked_from, APPROVAL: self.required}
        return {APPROVED: self.said, **{name: said for name, said in known.items() if said}}


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """A release that is live on a channel."""

    pointer: Pointer
    rehearsed: Rehearsed
    """The last one: against what was live when the pointer moved."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A candidate that did not replace what is live."""

    why: str
    rehearsed: Rehearsed
    """Beside the release that stays."""


@dataclass(frozen=True, kw_only=True)
class RollingOut:
    """A candidate that answers a share of the requests beside what is live."""

    rollout: Rollout
    rehearsed: Rehearsed
    """Beside the release that is live."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A candidate that was good enough, while another one is being rolled out."""

    why: str
    rehearsed: Rehearsed
    """Beside the release that is live."""


Concluded = Promoted | RollingOut | Waiting
"""What becomes of a candidate that no gate refuses."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """Where to look at what a run made."""

    title: str
    state: str
    """In which the run ends, where the release did not go live; empty where it did."""
    release: str
    run_url: str
    version_url: str
    release_uri: str
    report: Path


@dataclass(frozen=True, kw_only=True)
class RetrainPlan:
    """Whether to train, and from where."""

    job_file: JobFile
    """The job that was looked at, which is the one that is trained."""
    channel: Channel
    """The one that is retrained for."""
    settings: Settings
    flow_run_id: str
    asked: str
    live: Pointer | None
    """What was live when it was asked."""
    changed: Mapping[str, str]
    """What is not as it was for the live release, to how."""
    inputs: str
    """Digest of everything that a candidate is made from."""
    skip: str
    """Why nothing is to be done; empty when there is something."""
    start: Pointer | None
    """The live release whose weights training begins with."""
    began: float
    """When it was asked, by the monotonic clock."""
    read_seconds: float
    """Part of it that reading the user's data took."""

    @property
    def job(self) -> Job:
        """The job that was read."""
        return self.job_file.job

    def decided(self, decision: Verdict, why: str, *, candidate: str = "", version: str = "") -> Decision:
        """The record of an answer.

        Args:
            decision: which.
            why: the reason in words.
            candidate: id of the release that was made; empty when none was.
            version: its version in MLflow.
        """
        return Decision(
            model=self.channel.model,
            channel=self.channel.name,
            decision=decision,
            why=why,
            flow_run=self.flow_run_id,
            asked=self.asked,
            live=self.live.release if self.live else "",
            changed=self.changed,
            inputs=self.inputs,
            start=self.start.release if self.start else "",
            candidate=candidate,
            mlflow_version=version,
            seconds=round(time.monotonic() - self.began, 3),
        )


@dataclass(frozen=True, kw_only=True)
class RetrainResult:
    """What came of it, and where to look."""

    title: str
    decision: Decision
    run_url: str
    version_url: str = ""
    report: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, by whom and why, and where the services are."""

    channel: Channel
    mover: Mover
    settings: Settings
    allow: Sequence[str] = ()
    """In which kinds a promotion may differ from what is live."""


Moved = Pointer
"""What a move leaves behind: the pointer it wrote."""
Started = Rollout
"""What the begin of a rollout leaves behind: its first version."""

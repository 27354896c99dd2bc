"""One run of the flow: its job, its folder, where the services are, and what measures its cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from torchworker.contract import CppResult, Project
from train_and_ship.infra.fork_server import ForkServer, fork_server, running_fork_server
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import git_commit
from train_and_ship.infra.rundir import run_folder
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.signing import require_usable_keys
from train_and_ship.registry.cost import FLOW, Ledger, Meter, read_costs
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.run_folder import ABOUT, About, write_fact
from train_and_ship.registry.tracking.connection import check_reachable
from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.runs import TAG_COMMIT, TAG_FLOW_RUN, RunRecord
from train_and_ship.tasks.cpp import start_build
from train_and_ship.tasks.extras import require_extras
from train_and_ship.tasks.policy import quiet_mistakes
from train_and_ship.tasks.requests import project_of, run_params
from train_and_ship.tasks.snapshot import verified_snapshot


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
    fork_server: ForkServer
    store: ObjectStore
    live: LiveRun
    """The run in MLflow, fed while this one goes on."""
    cpp: Future[CppResult] | None
    """The C++ runner, being looked for or built; None when the job has no use for it."""
    ledger: Ledger

    def timed(self, stage: str) -> contextlib.AbstractContextManager[Meter]:
        """Add what the block takes to the stage's cost."""
        return self.ledger.stage(stage)

    def write_timings(self) -> Path:
        """`timings.json` in the run directory: seconds by stage, over all attempts."""
        path = self.folder / "timings.json"
        stages = {item.stage: item.wall for item in read_costs(self.folder) if item.stage != FLOW and item.wall}
        path.write_text(json.dumps({"stages": stages}, indent=1))
        return path

    @property
    def flow_run_url(self) -> str:
        return flow_run_page(self.settings, self.flow_run_id)


def flow_run_page(settings: Settings, flow_run_id: str) -> str:
    return f"{settings.prefect_ui_url}/runs/flow-run/{flow_run_id}"


@task(name="begin", task_run_name="begin", cache_policy=NO_CACHE)
async def begin(job_file: str, resume: str = "", decided: Job | None = None) -> Run:
    """Validate the job, and make sure that every service answers, before any work starts.

    resume: id of an earlier run whose stages and checkpoints are gone on with. decided: the job as it was when `decide`
    looked at it, which is what the record says was trained, whatever the file has become since.
    """
    quiet_mistakes()
    job, project_folder = load_job(Path(job_file))
    job = decided or job
    require_extras(job)
    settings = Settings.load()
    require_usable_keys(settings.signing_key, settings.public_key)
    flow_run_id = str(flow_run.get_id())
    folder = run_folder(settings.runs / job.name, flow_run_id, resume)
    ledger = ledger_of(folder)
    with ledger.stage("begin"):
        return await _begin(job, project_folder, settings, flow_run_id, folder, ledger)


async def _begin(
    job: Job, project_folder: Path, settings: Settings, flow_run_id: str, folder: Path, ledger: Ledger
) -> Run:
    # Workers import torch while this process imports MLflow and talks to the services.
    server = fork_server(folder.parent / "host.log")
    store = ObjectStore.from_settings(settings)
    (snapshot, snapshot_sha256), *_ = await asyncio.gather(
        asyncio.to_thread(verified_snapshot, settings, job, project_folder),
        asyncio.to_thread(check_reachable, settings.mlflow_url),
        asyncio.to_thread(_check_store, store),
    )
    commit = git_commit(project_folder)
    # The import of MLflow, more than a second, and the first requests go on in the background.
    live = LiveRun(
        RunRecord(
            model=job.name,
            run_name=str(flow_run.get_name()),
            params=run_params(job),
            tags={
                TAG_COMMIT: commit,
                TAG_FLOW_RUN: folder.name,
                "flow_run_url": flow_run_page(settings, flow_run_id),
            },
            note=f"In progress: [Prefect run]({flow_run_page(settings, flow_run_id)})",
            started=time.time(),
        ),
        settings.mlflow_url,
        get_run_logger().warning,
    )
    live.start()
    run = Run(
        cpp=start_build(server, job, folder),
        job=job,
        project=project_of(job, project_folder, snapshot),
        snapshot=snapshot_sha256,
        settings=settings,
        folder=folder,
        flow_run_id=flow_run_id,
        origin=folder.name,
        begun=_begun(folder),
        flow_run_name=str(flow_run.get_name()),
        git_commit=commit,
        fork_server=server,
        store=store,
        live=live,
        ledger=ledger,
    )
    about = About(
        job=job.model_dump(mode="json"),
        flow_run_id=flow_run_id,
        flow_run_name=run.flow_run_name,
        git_commit=commit,
        snapshot=snapshot_sha256,
        begun=run.begun,
    )
    write_fact(folder, ABOUT, about)
    return run


_ledgers: dict[Path, Ledger] = {}


def ledger_of(folder: Path) -> Ledger:
    """What measures the run of this folder in this process, begun on first use."""
    if folder not in _ledgers:
        _ledgers[folder] = Ledger(folder, _spent_by_children, _spent_by_server)
    return _ledgers[folder]


def close_ledger(folder: Path) -> None:
    """All that is to be counted has been done. Nothing happens when this process measures no such run."""
    if (ledger := _ledgers.pop(folder, None)) is not None:
        ledger.close()


def _spent_by_children() -> Mapping[str, float]:
    server = running_fork_server()
    return server.spent() if server is not None else {}


def _spent_by_server() -> float:
    server = running_fork_server()
    return server.own_seconds() if server is not None else 0.0


def _begun(folder: Path) -> str:
    path = folder / "begun"
    if not path.exists():
        path.write_text(datetime.now(UTC).isoformat(timespec="milliseconds"))
    return path.read_text()


def _check_store(store: ObjectStore) -> None:
    store.check()
    store.probe()

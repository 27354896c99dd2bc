"""One run of the flow: its job, its folder, where the services are, and what measures its cost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from torchworker.durable import write_durably
from train_and_ship.infra import janitor
from train_and_ship.infra.home import open_to_others
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import git_commit
from train_and_ship.infra.rundir import read_kept, run_folder
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.signing import require_usable_keys
from train_and_ship.registry.channels.timeline import utc_now
from train_and_ship.registry.kind import require_kinds
from train_and_ship.registry.run_folder import ABOUT, About, write_fact
from train_and_ship.registry.text import file_size
from train_and_ship.registry.tracking.connection import AwayError, check_reachable
from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.runs import TAG_COMMIT, TAG_FLOW_RUN, RunRecord
from train_and_ship.tasks.cpp import start_builds
from train_and_ship.tasks.extras import not_passed_on, require_extras
from train_and_ship.tasks.ledgers import ledger_of
from train_and_ship.tasks.requests import project_of, run_params
from train_and_ship.tasks.results import JobFile, Run, flow_run_page
from train_and_ship.tasks.rooms import Rooms
from train_and_ship.tasks.snapshot import verified_snapshot
from train_and_ship.tasks.stage import stage_task


@stage_task("begin", delays=())
async def begin(job_file: JobFile, resume: str = "", allow: Sequence[str] = ()) -> Run:
    """Make sure that the job can be done here, and that every service answers, before any work starts.

    Args:
        job_file: what is to be done. Whatever the file has become since, this is what the record says.
        resume: id of an earlier run whose stages and checkpoints are gone on with; empty for a new one.
        allow: in which kinds (KINDS) the candidate may differ from what is live, this once.

    Raises JobError for what the job needs and is not here, SettingsError or ServiceError for the services, RequestError
    for kinds that there are not.
    """
    require_kinds(allow)
    job = job_file.job
    require_extras(job, job_file.interpreter)
    settings = Settings.load()
    unread = await asyncio.to_thread(not_passed_on, job, job_file.project)
    for hint in (open_to_others(settings.home), unread, job_file.hint):
        if hint:
            get_run_logger().warning("%s", hint)
    require_usable_keys(settings.signing_key, settings.public_key)
    flow_run_id = str(flow_run.get_id())
    folder = run_folder(settings.runs / job.name, flow_run_id, resume)
    hold(folder)
    page = flow_run_page(settings, flow_run_id)
    ledger = ledger_of(folder)
    with ledger.stage("begin"):
        # Workers import torch while this process imports MLflow and talks to the services.
        rooms = Rooms(job_file.interpreter, folder.parent / "host.log")
        for server in dict.fromkeys((rooms.project, rooms.clean)):
            get_run_logger().debug("stages are forked by process %d, %s", server.pid, server.interpreter.path)
        store = ObjectStore.from_settings(settings)
        (snapshot, snapshot_sha256), *_ = await asyncio.gather(
            asyncio.to_thread(verified_snapshot, settings, job, job_file.project),
            asyncio.to_thread(_look_for_mlflow, settings.mlflow_url),
            asyncio.to_thread(_check_store, store),
            asyncio.to_thread(_make_room, settings, get_run_logger().warning),
        )
        commit = git_commit(job_file.project)
        # The import of MLflow, more than a second, and the first requests go on in the background.
        live = LiveRun(
            RunRecord(
                model=job.name,
                run_name=str(flow_run.get_name()),
                params=run_params(job),
                tags={
                    TAG_COMMIT: commit,
                    TAG_FLOW_RUN: folder.name,
                    "flow_run_url": page,
                },
                description=f"In progress: [Prefect run]({page})",
                started=time.time(),
            ),
            settings.mlflow_url,
            get_run_logger().warning,
        )
        live.start()
        run = Run(
            cpp=start_builds(rooms, job, folder),
            job=job,
            project=project_of(job, job_file.project, snapshot),
            snapshot=snapshot_sha256,
            settings=settings,
            folder=folder,
            flow_run_id=flow_run_id,
            origin=folder.name,
            begun=_begun(folder),
            flow_run_name=str(flow_run.get_name()),
            git_commit=commit,
            rooms=rooms,
            store=store,
            live=live,
            ledger=ledger,
            allow=tuple(allow),
        )
        about = About(
            job=job.model_dump(mode="json"),
            flow_run_id=flow_run_id,
            flow_run_name=run.flow_run_name,
            git_commit=commit,
            snapshot=snapshot_sha256,
            begun=run.begun,
            environments=rooms.environments(
                [*job.export.wanted, *(job.export.int8.wanted if job.export.int8 else ())], job.export.libraries
            ),
        )
        write_fact(folder, ABOUT, about)
        return run


def _begun(folder: Path) -> str:
    path = folder / "begun"

    def decode(content: bytes) -> str:
        datetime.fromisoformat(content.decode())
        return content.decode()

    if (begun := read_kept(path, decode)) is None:
        begun = utc_now()
        write_durably(path, begun.encode())
    return begun


def _make_room(settings: Settings, warn: Callable[..., None]) -> None:
    """Before anything new is written. What cannot be deleted is no reason to stop."""
    try:
        left = janitor.clean(settings).usage
    except OSError as error:
        warn("%s could not be cleaned: %s", settings.home, error)
        return
    if left.total > left.limit:
        warn(
            "what runs have left takes %s and SHIP_DISK is %s: all of it is in use, or a run may be gone on with; "
            "`ship status` shows what it is",
            file_size(left.total), file_size(left.limit),
        )  # fmt: skip


def _look_for_mlflow(url: str) -> None:
    """A server that is away when a run begins is told later, by `LiveRun`, which says so; the version needs it."""
    with contextlib.suppress(AwayError):
        check_reachable(url)


def _check_store(store: ObjectStore) -> None:
    store.check()
    store.probe()

"""`ship run`: the flow in this process, its log in this terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

from train_and_ship.infra.errors import GateError, ShipError
from train_and_ship.infra.fork_server import fork_server
from train_and_ship.infra.interpreter import Interpreter
from train_and_ship.infra.job_folders import leave_worker
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.prefect_rest import require_prefect
from train_and_ship.infra.projects import claim
from train_and_ship.infra.rundir import run_folder
from train_and_ship.infra.settings import HEARTBEAT_SECONDS, Settings
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.run_folder import registration
from train_and_ship.ship.event_loop import to_its_end
from train_and_ship.ship.named import named_kinds
from train_and_ship.ship.pages import REPORT
from train_and_ship.ship.results import Retrained, Shipped
from train_and_ship.tasks.extras import require_variables
from train_and_ship.tasks.interpreters import choose_interpreter
from train_and_ship.tasks.shipped import require_files

if TYPE_CHECKING:
    from train_and_ship.tasks import results as tasks

_T = TypeVar("_T")


def run(job_file: Path, resume: str, allow: list[str] | None, changes: Sequence[str], as_json: bool) -> None:
    """Run train-and-ship once, and print where to look.

    Args:
        job_file: what is to be done.
        resume: as of `run_job`.
        allow: as of `run_job`.
        changes: what is to be done otherwise than the file says, as `load_job` takes it.
        as_json: print the same as JSON; the log is on standard error either way.

    Raises ShipError with one message when it does not end with a promotion.
    """
    # Before Prefect is imported: a mistake in the job file is answered at once.
    job, project = load_job(job_file, changes)
    with _exit_by_signal():
        _print(run_job(job, job_file, project, resume, allow), as_json)


def run_job(job: Job, job_file: Path, project: Path, resume: str, allow: list[str] | None) -> Shipped:
    """Run train-and-ship once, going on with an earlier run when `resume` names one.

    Args:
        job: what is to be done.
        job_file: what it was read from; paths are relative to its folder.
        project: absolute folder.
        resume: id of the earlier run; empty for a new one.
        allow: kinds in which the release may be another than what is live.

    Raises ShipError with one message when it does not end with a promotion.
    """
    interpreter = choose_interpreter(job, job_file, project).interpreter
    kinds = named_kinds(allow)
    _prepare(job, project, resume, interpreter, reads_data=True)
    from train_and_ship.flows.train_and_ship import train_and_ship
    from train_and_ship.tasks.job_file import give_job
    from train_and_ship.tasks.policy import prefect_of

    give_job(job_file, job, project)
    # Called, a flow that ends with a state of its own gives that state's result.
    with prefect_of(Settings.load()), _saying_where(job, resume):
        flow = train_and_ship(job=str(job_file), resume=resume, allow=kinds)
        done = cast("tasks.Shipped", _ended(flow))
    return Shipped(
        model=job.name,
        channel=job.release.channel,
        release=done.release,
        headline=done.title,
        run_url=done.run_url,
        version_url=done.version_url,
        release_uri=done.release_uri,
        report=done.report,
    )


def retrain(job_file: Path, why: str, force: bool, resume: str, allow: list[str] | None, as_json: bool) -> None:
    """Run retrain once, and print what came of it.

    Args:
        job_file: what is asked about.
        why: as of `retrain_job`.
        force: as of `retrain_job`.
        resume: as of `retrain_job`.
        allow: as of `retrain_job`.
        as_json: as of `run`.

    Raises ShipError with one message when there is no candidate, or no gate lets it through.
    """
    job, project = load_job(job_file)
    with _exit_by_signal():
        _print(retrain_job(job, job_file, project, why, force, resume, allow), as_json)


def retrain_job(
    job: Job, job_file: Path, project: Path, why: str, force: bool, resume: str, allow: list[str] | None
) -> Retrained:
    """Run retrain once.

    Args:
        job: what is asked about.
        job_file: what it was read from; paths are relative to its folder.
        project: absolute folder.
        why: what is new, for the record.
        force: train although nothing has changed.
        resume: id of the earlier run; empty for a new one.
        allow: kinds in which the release may be another than what is live.

    Raises ShipError with one message when there is no candidate, or no gate lets it through.
    """
    interpreter = choose_interpreter(job, job_file, project).interpreter
    job.unattended()
    kinds = named_kinds(allow)
    # What the manifest of a snapshot says may be the answer, and nobody needs torch.
    _prepare(job, project, resume, interpreter, reads_data=job.data.snapshot is None)
    from train_and_ship.flows.retrain import retrain
    from train_and_ship.tasks.job_file import give_job
    from train_and_ship.tasks.policy import prefect_of

    give_job(job_file, job, project)
    with prefect_of(Settings.load()), _saying_where(job, resume):
        flow = retrain(job=str(job_file), why=why, force=force, resume=resume, allow=kinds)
        done = cast("tasks.RetrainResult", _ended(flow))
    return Retrained(
        model=job.name,
        channel=job.release.channel,
        decision=str(done.decision.decision),
        why=done.decision.why,
        headline=done.title,
        candidate=done.decision.candidate,
        run_url=done.run_url,
        version_url=done.version_url,
        report=done.report,
    )


def _print(done: Shipped | Retrained, as_json: bool) -> None:
    typer.echo(done.json() if as_json else f"\n{done}")


def _prepare(job: Job, project: Path, resume: str, interpreter: Interpreter, *, reads_data: bool) -> None:
    """What has to be so before Prefect is imported: its server answers, and its settings are in the environment.

    Args:
        job: what is to be done.
        project: absolute folder.
        resume: id of an earlier run; empty for a new one.
        interpreter: of the job's code.
        reads_data: whether that begins with reading the data.
    """
    leave_worker()
    settings = Settings.load()
    require_variables(job)
    require_files(job, project)
    if resume:
        run_folder(settings.runs / job.name, "", resume)
    require_prefect(settings)
    claim(settings.home, job.name, project)
    if reads_data:
        # Workers import torch while this process imports Prefect.
        fork_server(settings.runs / job.name / "host.log", interpreter)
    os.environ.update(settings.prefect_variables)
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))


@contextlib.contextmanager
def _saying_where(job: Job, resume: str) -> Iterator[None]:
    """An error says besides what is live meanwhile, and where to look; the table of the gates is in the report."""
    from train_and_ship.tasks.job_file import newest_run

    before = newest_run()
    try:
        yield
    except ShipError as error:
        if isinstance(error, GateError):
            error = GateError(error.message)
        run = newest_run()
        for line in _places(job, "" if run == before else run, resume):
            error.add_note(line)
        raise error from None


def _places(job: Job, run: str, resume: str) -> Iterator[str]:
    from train_and_ship.tasks.results import flow_run_page

    settings = Settings.load()
    with contextlib.suppress(ShipError):
        live = read_pointer(Channel(ObjectStore.from_settings(settings), job.name, job.release.channel))
        said = f"unchanged: release {live.release} is live, since {live.moved_at}" if live else "nothing is live"
        yield f"  {job.release.channel:<8} {said}"
    if not run:
        return
    yield f"  run      {flow_run_page(settings, run)}"
    folder = settings.runs / job.name / (resume or run)
    if (registered := registration(folder)) is not None:
        yield f"  version  {registered.version_url}"
        yield f"  release  s3://{settings.bucket}/{release_prefix(job.name, registered.release)}"
    if (folder / REPORT).is_file():
        yield f"  report   {folder / REPORT}"


def _ended(flow: Coroutine[Any, Any, _T]) -> _T:
    """Run a flow to its end. Raises StoppedError when a person has stopped the run."""
    from train_and_ship.tasks.policy import Abort
    from train_and_ship.tasks.stopping import StoppedError

    try:
        return to_its_end(flow)
    except Abort as stopped:
        raise StoppedError(str(stopped)) from None


@contextlib.contextmanager
def _exit_by_signal() -> Iterator[None]:
    """A signal that ended a flow is the exit status."""
    try:
        yield
    except BaseException as stop:
        # Its class is Prefect's, which a mistake in the job file does not import.
        if type(stop).__name__ == "TerminationSignal":
            raise typer.Exit(128 + stop.signal) from None  # type: ignore[attr-defined]
        raise

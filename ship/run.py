"""`ship run`: the flow in this process, its log in this terminal."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx
import typer

from infra.errors import ServiceError, SettingsError
from infra.settings import HEARTBEAT_SECONDS, Settings
from infra.workerhost import worker_host
from registry.job import load_job

if TYPE_CHECKING:
    from tasks.decide import Night


def run(job_file: Path, resume: str) -> None:
    """Run train-and-ship once, going on with an earlier run when `resume` names one.

    Raises ShipError with one message when it does not end with a promotion.
    """
    # Before Prefect is imported: a mistake in the job file is answered at once.
    job, _ = load_job(job_file)
    settings = Settings.load()
    _require_prefect(settings)
    # Workers import torch while this process imports Prefect.
    worker_host(settings.runs / job.name / "host.log")
    # Prefect reads its settings when it is imported.
    os.environ["PREFECT_API_URL"] = settings.prefect_api_url
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    from flows.train_and_ship import train_and_ship
    from tasks.policy import TerminationSignal

    try:
        shipped = asyncio.run(train_and_ship(job=str(job_file), resume=resume))
    except TerminationSignal as stop:
        raise typer.Exit(128 + stop.signal) from None
    typer.echo(
        f"\n{shipped.title}\n"
        f"  run      {shipped.run_url}\n"
        f"  version  {shipped.version_url}\n"
        f"  release  {shipped.release_uri}\n"
        f"  report   {shipped.report}\n"
        f"timings: {shipped.timings}"
    )


def retrain(job_file: Path, why: str, force: bool, resume: str) -> None:
    """Run retrain once. Raises ShipError with one message when there is no candidate, or no gate lets it through."""
    job, _ = load_job(job_file)
    job.unattended()
    settings = Settings.load()
    _require_prefect(settings)
    if job.data.snapshot is None:
        # Else what the manifest says may be the answer, and nobody needs torch.
        worker_host(settings.runs / job.name / "host.log")
    os.environ["PREFECT_API_URL"] = settings.prefect_api_url
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    from flows.retrain import retrain
    from tasks.policy import TerminationSignal

    try:
        # Called, a flow that ends with a state of its own gives that state's result.
        night = cast("Night", asyncio.run(retrain(job=str(job_file), why=why, force=force, resume=resume)))
    except TerminationSignal as stop:
        raise typer.Exit(128 + stop.signal) from None
    places = {"run": night.run_url, "version": night.version_url, "report": night.report, "why": night.decision.why}
    lines = [f"  {name:<8} {value}" for name, value in places.items() if value]
    typer.echo("\n".join(["", night.title, *lines]))


def _require_prefect(settings: Settings) -> None:
    """Raises ServiceError when the server does not answer, SettingsError when it wants another password."""
    account = os.environ.get("PREFECT_API_AUTH_STRING", "")
    user, _, password = account.partition(":")
    try:
        # Unlike /health this one asks for the password.
        answer = httpx.get(
            f"{settings.prefect_api_url}/admin/version", timeout=5, auth=(user, password) if account else None
        )
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise SettingsError(
                "environment variable PREFECT_API_AUTH_STRING: expected the user:password of the Prefect server at "
                f"{settings.prefect_api_url}, got {'another one' if account else 'nothing'}"
            )
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"Prefect: expected a server at {settings.prefect_api_url}, got {type(error).__name__}: {error}. "
            "`ship up` starts a local one; PREFECT_API_URL names another"
        ) from None

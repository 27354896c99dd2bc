"""Stage: the release goes to the bucket and the channel's pointer moves to it, once, atomically."""

from __future__ import annotations

import asyncio
import getpass
from dataclasses import dataclass

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from infra.errors import GateError
from registry import mlflow_versions
from registry.channels import move_channel, read_live
from registry.gates import require_not_worse
from registry.pointer import Pointer, read_pointer
from registry.release import Manifest
from registry.releases import publish
from tasks.policy import worth_retrying
from tasks.register import Registered
from tasks.run import Run
from tasks.validate import Validated

CHAMPION, CHALLENGER = "champion", "challenger"
PRODUCTION = "prod"


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """A release that is live on a channel."""

    pointer: Pointer
    sent_bytes: int
    alias: str


def alias_of(channel: str) -> str:
    """The MLflow alias that mirrors a channel: `champion` for prod, else the channel's own name."""
    return CHAMPION if channel == PRODUCTION else channel


@task(
    name="promote",
    task_run_name="promote",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=[1, 2, 5, 15],
    retry_condition_fn=worth_retrying,
)
async def promote(run: Run, registered: Registered, validated: Validated) -> Promoted:
    """Publish, move the pointer, then let the MLflow alias follow it; every step can be repeated.

    Raises GateError when what is live by then is better than the job's `vs_live` allows; the version stays in
    MLflow as the challenger.
    """
    channel, name, uri = run.job.release.channel, run.job.name, run.settings.mlflow_url
    with run.timed("promote"):
        try:
            pointer, sent = await asyncio.to_thread(_publish_and_move, run, registered, validated)
        except GateError:
            await asyncio.to_thread(mlflow_versions.set_alias, name, CHALLENGER, registered.version.version, uri)
            raise
        alias = alias_of(channel)
        # The pointer decides, and by now another run may have moved it on: the alias follows what is live.
        live = await asyncio.to_thread(read_pointer, run.store, name, channel)
        version = (live or pointer).mlflow_version
        await asyncio.to_thread(mlflow_versions.set_alias, name, alias, version, uri)
    get_run_logger().info(
        "%s is live on %s: generation %d, release %s, %s bytes sent",
        name, channel, pointer.generation, pointer.release, f"{sent:,}",
    )  # fmt: skip
    return Promoted(pointer=pointer, sent_bytes=sent, alias=alias)


def _publish_and_move(run: Run, registered: Registered, validated: Validated) -> tuple[Pointer, int]:
    def accept(pointer: Pointer | None, live: Manifest | None) -> None:
        metrics = live.metrics if live is not None else None
        require_not_worse(run.job, validated.quality, metrics, pointer.release if pointer else "")

    # Asked twice: here so that a worse candidate is not uploaded, and again for what is live when the pointer moves.
    accept(*read_live(run.store, run.job.name, run.job.release.channel))
    published = publish(run.store, registered.folder, registered.manifest, signing_key=run.settings.signing_key)
    pointer = move_channel(
        run.store,
        registered.manifest,
        model=run.job.name,
        channel=run.job.release.channel,
        reason="all gates passed",
        moved_by=getpass.getuser(),
        flow_run=run.flow_run_id,
        mlflow_version=registered.version.version,
        accept=accept,
        etags=published.etags,
    )
    return pointer, published.sent_bytes

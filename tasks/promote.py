"""Stage: the release goes to the bucket and the channel's pointer moves to it, once, atomically."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from infra.errors import GateError
from infra.provenance import who
from registry.channels import move_channel, read_live
from registry.description import in_short
from registry.gates import require_not_worse
from registry.mirror import alias_of, follow, set_challenger
from registry.moves import require_not_rolled_back
from registry.pointer import Pointer
from registry.release import Manifest
from registry.releases import publish
from tasks.policy import worth_retrying
from tasks.register import Registered
from tasks.run import Run
from tasks.validate import Validated


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """A release that is live on a channel."""

    pointer: Pointer
    sent_bytes: int
    alias: str


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

    Raises GateError when what is live by then is better than the job's `vs_live` allows, or when a rollback has just
    taken this very release off; the version stays in MLflow as the challenger. MLflow decides nothing here: when it
    does not answer, the release is live all the same and the alias follows later.
    """
    channel, name, uri = run.job.release.channel, run.job.name, run.settings.mlflow_url
    log = get_run_logger()
    with run.timed("promote"):
        try:
            pointer, sent = await asyncio.to_thread(_publish_and_move, run, registered, validated)
        except GateError:
            for warning in await asyncio.to_thread(set_challenger, name, registered.version.version, uri):
                log.warning(warning)
            raise
        for warning in await asyncio.to_thread(follow, run.store, name, channel, uri):
            log.warning(warning)
    log.info(
        "%s is live on %s: generation %d, release %s, %s bytes sent",
        name, channel, pointer.generation, pointer.release, f"{sent:,}",
    )  # fmt: skip
    return Promoted(pointer=pointer, sent_bytes=sent, alias=alias_of(channel))


def _publish_and_move(run: Run, registered: Registered, validated: Validated) -> tuple[Pointer, int]:
    def accept(pointer: Pointer | None, live: Manifest | None) -> None:
        require_not_rolled_back(registered.manifest.release, pointer)
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
        moved_by=who(),
        flow_run=run.flow_run_id,
        mlflow_version=registered.version.version,
        accept=accept,
        etags=published.etags,
        verdicts=in_short(validated.result.verdicts),
    )
    return pointer, published.sent_bytes

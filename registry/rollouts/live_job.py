"""What the job of the live release says to servers, and whether a rollout's limits have anything to be asked of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.bucket.recorded_job import recorded_job
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.rollouts.record import Rollout


def live_observe(channel: Channel) -> Mapping[str, Any] | None:
    """`observe` of the live release's job, as it was recorded; None where it says nothing. Reads only.

    Raises ReleaseError for a job that cannot be read.
    """
    live = read_pointer(channel)
    if live is None:
        return None
    job = recorded_job(channel.store, live.model, live.release, sha256=live.manifest_sha256)
    said = job.get("observe")
    return said if isinstance(said, dict) else None


def not_observed(channel: Channel, rollout: Rollout) -> str:
    """Why the limits of a rollout would be asked of nothing, in words; empty where there are none. Reads only."""
    if not rollout.stop_if:
        return ""
    try:
        said = live_observe(channel)
    except ReleaseError as error:
        return f"whether anything will be observed is not known: {error}"
    if said is None:
        return (
            f"nothing will be observed: the job of the live release has no `observe`, so nothing can be said of "
            f"stop_if ({', '.join(rollout.stop_if)})"
        )
    return ""

"""One look at a running rollout: decide, and do it. Whoever looks again does nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.catalog import channels, models
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover
from train_and_ship.registry.rollouts.decide import Action, decide
from train_and_ship.registry.rollouts.moves import go_on, settle, stop
from train_and_ship.registry.rollouts.record import Outcome, Rollout, read_rollout


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rollout that was running, and what came of the look."""

    channel: Channel
    before: Rollout
    after: Rollout
    """The same where nothing was to be done."""
    why: str
    """What decided, in words."""

    @property
    def ended(self) -> bool:
        """Whether this look, or somebody else meanwhile, has ended it."""
        return not self.after.is_running

    def __str__(self) -> str:
        if not self.ended:
            return f"{self.channel}: {self.after}; {self.why}"
        if self.after.outcome is Outcome.PROMOTED:
            return f"{self.channel}: release {self.after.release} is live, after its rollout"
        return f"{self.channel}: the rollout of release {self.before.release} has ended, {self.after.outcome}"


def with_rollouts(store: ObjectStore, model: str = "", tracking_uri: str = "") -> Iterator[Channel]:
    """Channels of the model, or of every model, whose rollout is not said to have ended. Reads only.

    One that cannot be read is among them: whoever looks at it is told.

    Args:
        store: the bucket.
        model: empty for all.
        tracking_uri: MLflow's.
    """
    for name in [model] if model else models(store):
        for channel in (Channel(store, name, one, tracking_uri) for one in channels(store, name)):
            try:
                there = read_rollout(channel)
            except ReleaseError:
                yield channel
                continue
            if there is not None and there.is_running:
                yield channel


def look(channel: Channel, mover: Mover) -> Seen | None:
    """Do what is due; None where no rollout is running. Writes; can be repeated, and killed anywhere.

    Raises as `go_on`.
    """
    before = read_rollout(channel)
    if before is None or not before.is_running:
        return None
    settled = settle(channel, mover.by)
    if settled is None or settled.nonce != before.nonce:
        return Seen(channel=channel, before=before, after=settled or before, why="another pointer has ended it")
    decided = decide(before, channel.store)
    mover = replace(mover, why=decided.why)
    if decided.action is Action.WAIT:
        after = before
    elif decided.action is Action.NEXT:
        after = go_on(channel, before, mover)
    else:
        after = stop(channel, before, decided.outcome, mover)
    return Seen(channel=channel, before=before, after=after, why=decided.why)

"""What a rollout is to do now: go on, wait, or end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.identity import moment
from train_and_ship.registry.rollouts.record import Outcome, Rollout


class Action(StrEnum):
    """What is to be done with a rollout."""

    NEXT = "next"
    """Go to the next step; from the last one, put the candidate live."""
    WAIT = "wait"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What is to be done, and why."""

    action: Action
    why: str
    """In words, for the record."""
    outcome: Outcome = Outcome.NONE
    """What became of it, where it stops."""


def decide(rollout: Rollout, store: ObjectStore) -> Decided:
    """By the time alone: a step lasts as long as the rollout says, and all of them end by its deadline. Reads only.

    Every time is the store's: the clocks of whoever starts, watches and reads need not agree.
    """
    now = store.now()
    if now >= moment(rollout.deadline):
        return Decided(
            action=Action.STOP, why=f"undecided at its deadline, {rollout.deadline}", outcome=Outcome.UNDECIDED
        )
    if now < rollout.next_at:
        return Decided(action=Action.WAIT, why=f"it stands until {rollout.next_at.isoformat()}")
    return Decided(action=Action.NEXT, why=f"it has stood for {rollout.every:,} s")

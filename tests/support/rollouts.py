"""Rollouts of small releases, and a clock of the store that tests turn."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.releases import CHANNEL, MODEL
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover
from train_and_ship.registry.channels.swap import Move
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.rollouts.moves import Plan, start
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.registry.rollouts.watch import Seen, look

WATCHER = Mover(by="watch@worker", why="the clock")
PLAN = Plan(steps=(100, 500, 10_000), every=600, max_hours=2, key="user_id")


class Clock:
    """The store's, as all stores of this process are told it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = datetime(2026, 12, 1, 12, tzinfo=UTC)
        monkeypatch.setattr(ObjectStore, "now", lambda store: self.now)

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def channel_of(store: ObjectStore) -> Channel:
    return Channel(store, MODEL, CHANNEL)


def begun(store: ObjectStore, manifest: Manifest, plan: Plan = PLAN, *, again: bool = False, **changes: Any) -> Rollout:
    said: dict[str, Any] = {"reason": "new scans", "moved_by": "ada@host", "mlflow_version": "8", **changes}
    return start(channel_of(store), Move(manifest=manifest, **said), plan, again=again)


def looked(store: ObjectStore) -> Seen | None:
    return look(channel_of(store), WATCHER)


def a_rollout(**changes: Any) -> Rollout:
    """One version of a rollout, sound in itself."""
    made = Rollout(
        model=MODEL, channel=CHANNEL, generation=7, extends=uuid.UUID(int=1).hex, release="ab" * 10,
        manifest_sha256="cd" * 32, number=1, rollout=uuid.UUID(int=2).hex, nonce=uuid.UUID(int=3).hex,
        steps=(100, 500, 10_000), every=600, deadline="2026-12-02T12:00:00+00:00", key="user_id",
        started_at="2026-12-01T12:00:00+00:00", moved_at="2026-12-01T12:00:00+00:00", moved_by="ada@host",
        reason="new scans", why="new scans",
    )  # fmt: skip
    return replace(made, **changes)

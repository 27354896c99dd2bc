"""The object of a rollout as it lies in the bucket, written by hand: readers are tested apart from its writer."""

from __future__ import annotations

from typing import Any

from tests.support.releases import CHANNEL, MODEL
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.release.manifest import Manifest

KEY = f"models/{MODEL}/rollouts/{CHANNEL}.json"
STEPS = [100, 500, 2500, 10_000]
NOW = "2026-12-01T04:00:00Z"


def rollout_document(pointer: Pointer, candidate: Manifest, **changes: Any) -> dict[str, Any]:
    """A rollout of a candidate beside what this pointer has live, at 5 %. changes: keys with other values."""
    document = {
        "format": 1, "model": MODEL, "channel": CHANNEL,
        "generation": pointer.generation, "extends": pointer.nonce,
        "release": candidate.release, "manifest_sha256": candidate.sha256(),
        "number": 1, "rollout": "a" * 32, "nonce": "b" * 32,
        "state": "running", "outcome": "", "steps": STEPS, "step": 1, "share": 500, "every": 600,
        "deadline": "2026-12-02T04:00:00Z", "key": "user_id", "fallback_ms": 0, "shadow": False,
        "stop_if": {}, "observe": {}, "started_at": NOW, "moved_at": NOW, "moved_by": "tester", "reason": "",
        "flow_run": "", "mlflow_version": "8", "verdicts": {},
    }  # fmt: skip
    return {**document, **changes}


def put_rollout(store: ObjectStore, body: bytes) -> None:
    """Write the object over whatever lies there."""
    stored = store.head(KEY)
    if stored is None:
        store.put_new(KEY, body)
    else:
        store.replace(KEY, body, stored.etag)


def roll_out(store: ObjectStore, pointer: Pointer, candidate: Manifest, **changes: Any) -> dict[str, Any]:
    """Have a rollout as `rollout_document` makes it; what was written."""
    document = rollout_document(pointer, candidate, **changes)
    put_rollout(store, canonical_json(document))
    return document

"""Small releases of random bytes, and how tests publish and promote them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.stack_servers import MlflowServer
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover, roll_back
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.swap import Accept, Move, Replacing, move_channel
from train_and_ship.registry.channels.targets import choose_rollback, verify_target
from train_and_ship.registry.release.manifest import MANIFEST, Manifest, build_manifest
from train_and_ship.registry.tracking.rest import RestRegistry

MODEL, CHANNEL = "digits", "prod"
POINTER = "/channels/"
NOWHERE = f"http://127.0.0.1:{free_port()}"
"""Nobody listens there."""
MOVER = Mover(by="ada@host", why="errors since 14:00")


def make_release(folder: Path, seed: int = 0, accuracy: float = 0.97, files: int = 4) -> Manifest:
    """A small release in a new folder; another seed is another release."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for index in range(files):
        (folder / f"file{index}.bin").write_bytes(generator.randbytes(1000 + index))
    return build_manifest(
        folder, model=MODEL, formats={"onnx": "file0.bin"}, signature={}, metrics={"accuracy": accuracy}
    )


def published(store: ObjectStore, folder: Path, seed: int = 0, accuracy: float = 0.97) -> Manifest:
    manifest = make_release(folder, seed, accuracy)
    publish(store, folder, manifest)
    return manifest


def move(
    store: ObjectStore,
    manifest: Manifest,
    accept: Accept | None = None,
    *,
    model: str = MODEL,
    channel: str = CHANNEL,
    replacing: Replacing | None = None,
    **changes: Any,
) -> Pointer:
    said: dict[str, Any] = {"reason": "all gates passed", "moved_by": "tester", "flow_run": "run-1"}
    asked = Move(manifest=manifest, **{**said, "mlflow_version": "7", **changes})
    return move_channel(Channel(store, model, channel), asked, accept=accept, replacing=replacing)


def rolled_back(store: ObjectStore, to: str = "", uri: str = NOWHERE, *, channel: str = CHANNEL) -> Pointer:
    target = choose_rollback(Channel(store, MODEL, channel, uri), to)
    return roll_back(verify_target(target), MOVER)


def replace_object(store: ObjectStore, key: str, body: bytes) -> None:
    stored = store.head(key)
    assert stored is not None
    store.replace(key, body, stored.etag)


def damage(store: ObjectStore, key: str) -> None:
    """Other bytes of the same number."""
    stored = store.head(key)
    assert stored is not None
    replace_object(store, key, b"x" * stored.bytes)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a release that was downloaded, but its manifest."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def aliases(mlflow: MlflowServer) -> dict[str, int]:
    """The version behind each alias."""
    return {alias: int(version) for alias, version in RestRegistry(mlflow.url).aliases(MODEL).items()}


def key_of(manifest: Manifest, name: str) -> str:
    return release_prefix(manifest.model, manifest.release) + name


def ignore(value: object) -> None:
    """For a lambda that returns nothing."""

"""What is live, as tests of flows look at it from outside."""

from __future__ import annotations

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer


def live(store: ObjectStore, model: str) -> tuple[int, str] | None:
    """(generation, release) on prod."""
    pointer = read_pointer(Channel(store, model, "prod"))
    return (pointer.generation, pointer.release) if pointer else None

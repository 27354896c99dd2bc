"""What tests of flows look at from outside."""

from __future__ import annotations

import psutil

from infra.objectstore import ObjectStore
from registry.pointer import read_pointer


def live(store: ObjectStore, model: str) -> tuple[int, str] | None:
    """(generation, release) on prod."""
    pointer = read_pointer(store, model, "prod")
    return (pointer.generation, pointer.release) if pointer else None


def orphans() -> list[str]:
    """Worker processes on this machine whose flow process is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if "torchworker.host" in words and process.info["ppid"] == 1:
            found.append(" ".join(words))
    return found

"""What tests of flows look at from outside."""

from __future__ import annotations

import os

import psutil

from infra.objectstore import ObjectStore
from registry.pointer import read_pointer


def live(store: ObjectStore, model: str) -> tuple[int, str] | None:
    """(generation, release) on prod."""
    pointer = read_pointer(store, model, "prod")
    return (pointer.generation, pointer.release) if pointer else None


def orphans() -> list[str]:
    """Worker processes of this stack whose flow process is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        ours = environment.get("SHIP_HOME") == os.environ["SHIP_HOME"]
        if "torchworker.host" in words and process.info["ppid"] == 1 and ours:
            found.append(" ".join(words))
    return found

"""Promotions in processes of their own that can be killed: forked from one that has boto3 already.

Protocol, one JSON object a line. In: {"folder": …, "manifest": …, "copy": …}. Out: {"pid": …} when the promotion has
its process, {"status": …, "error": …} when that ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.projects import REPOSITORY
from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.release.manifest import Manifest, decode_manifest


def promote(store: ObjectStore, folder: Path, manifest: Manifest, copy: Path, channel: str = "prod") -> Pointer:
    """What a promotion does with the store: publish, download what is to be tried, move."""
    published = publish(store, folder, manifest)
    fetch_release(store, manifest.model, manifest.release, copy)
    move = Move(manifest=manifest, reason="chaos", moved_by="tester", etags=published.etags)
    return move_channel(Channel(store, manifest.model, channel), move, accept=lambda pointer, live: None)


class PromoterHost:
    """A running `python -m tests.support.promoter`, for one promotion at a time, with the environment's store."""

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "tests.support.promoter"]
        self._process = subprocess.Popen(
            argv, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=60)

    def start(self, folder: Path, manifest: Path, copy: Path) -> int:
        """Returns the promoter's process id."""
        self._process.stdin.write(
            json.dumps({"folder": str(folder), "manifest": str(manifest), "copy": str(copy)}) + "\n"
        )  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return int(self._read()["pid"])

    def wait(self) -> tuple[int, str]:
        """Exit status, negative for a signal, and what went wrong."""
        message = self._read()
        return int(message["status"]), str(message["error"])

    def _read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]
        return message


def _child(job: dict[str, str], errors: int) -> None:
    """Never returns."""
    status = 70
    try:
        store = ObjectStore.from_settings(Settings.load())
        promote(store, Path(job["folder"]), decode_manifest(Path(job["manifest"]).read_bytes()), Path(job["copy"]))
        status = 0
    except ShipError as error:
        os.write(errors, str(error).encode())
        status = 1
    finally:
        os._exit(status)


def main() -> None:
    # Clients are made after the fork; this only imports.
    ObjectStore.from_settings(Settings.load())
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line), writer)
        os.close(writer)
        print(json.dumps({"pid": pid}), flush=True)
        with os.fdopen(reader, "rb") as errors:
            said = errors.read().decode()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "error": said}), flush=True)


if __name__ == "__main__":
    main()

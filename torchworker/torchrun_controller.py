"""Looks after one torchrun on each of several machines: the store where they meet, a connection to each, the end.

Started by `infra/launchers/hosts.py`, which describes the files. The store is here and not on one of the machines, so
that losing any of them leaves it where it is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchworker.process.lifeline import die_with_parent

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""How long the others may take to notice by themselves that a job is over, and to say why."""


@dataclass
class Watch:
    """The machines of one job."""

    folder: Path
    plan: dict[str, Any]
    connections: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    """Exit status of each connection that ended, in that order."""

    def run(self) -> None:
        """Start all, wait until the job is over, and write `hosts.ended.json`."""
        port, self.store = _store(self.plan["address"], self.plan["port"])
        for host, argv in self.plan["hosts"].items():
            with (self.folder / f"host-{host.rpartition('@')[2]}.log").open("ab") as log:
                self.connections[host] = subprocess.Popen(
                    [part.replace("@PORT@", str(port)) for part in argv],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=functools.partial(die_with_parent, os.getpid()),
                )
            self._give(self.connections[host])
        reason, blames = self._wait()
        for connection in self.connections.values():
            connection.kill()
            connection.wait()
        draft = self.folder / "hosts.ended.json.part"
        draft.write_text(json.dumps({"reason": reason, "blames": blames, "exit": self.ended}, indent=1))
        draft.replace(self.folder / "hosts.ended.json")

    def _give(self, connection: subprocess.Popen[bytes]) -> None:
        """The line that the lease at the other end waits for: what is in no argument list and no file."""
        assert connection.stdin is not None
        given = {name: os.environ[name] for name in self.plan["given"]}
        # Whoever does not read is found by `_wait`.
        with contextlib.suppress(BrokenPipeError):
            connection.stdin.write(json.dumps(given).encode() + b"\n")
            connection.stdin.flush()

    def _wait(self) -> tuple[str, str]:
        """Until the job is over; why, and who is to blame."""
        limit, grace = self.plan["time_limit"], None
        began = beat = time.monotonic()
        while len(self.ended) < len(self.connections):
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now >= beat:
                self._beat()
                beat = now + BEAT_SECONDS
            for host, connection in self.connections.items():
                if host not in self.ended and (status := connection.poll()) is not None:
                    self.ended[host] = status
            if limit and now - began > limit:
                return "stopped", f"the job reached its time limit of {limit} s"
            if grace is None and self._decided():
                grace = now + GRACE_SECONDS
            if grace is not None and now > grace:
                silent = [host for host in self.connections if host not in self.ended]
                if any(status == 0 for status in self.ended.values()):
                    break
                return self._summary(), self._lost() or f"{' and '.join(silent)} did not end with the others"
        return self._summary(), self._lost()

    def _decided(self) -> bool:
        """Whether the job cannot go on: one machine has finished, or too few are left."""
        left = len(self.connections) - len(self.ended)
        return any(status == 0 for status in self.ended.values()) or left < self.plan["min_nodes"]

    def _beat(self) -> None:
        for host, connection in self.connections.items():
            if host in self.ended or connection.stdin is None:
                continue
            try:
                os.set_blocking(connection.stdin.fileno(), False)
                os.write(connection.stdin.fileno(), b".")
            except (BlockingIOError, BrokenPipeError):
                # Nobody reads: the connection is about to end, or the lease will run out.
                continue

    def _summary(self) -> str:
        said = [f"{host} ended with {_words(status)}" for host, status in self.ended.items()]
        said += [f"{host} was stopped" for host in self.connections if host not in self.ended]
        return ", then ".join(said)

    def _lost(self) -> str:
        """The first machine whose connection broke; torchrun itself never ends like that."""
        for host, status in self.ended.items():
            if status < 0 or status in (137, 255):
                return f"host {host} was lost (its connection ended with {_words(status)})"
        return ""


def _words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _store(address: str, port: int) -> tuple[int, TCPStore]:
    """A store that listens on this address only, and its port."""
    listener = socket.create_server((address, port))
    chosen = int(listener.getsockname()[1])
    store = TCPStore(
        address,
        chosen,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=False,
        master_listen_fd=listener.detach(),
    )
    return chosen, store


def main() -> None:
    """Watch the job whose plan is in the folder that is the first argument."""
    folder = Path(sys.argv[1])
    # A request to stop is an ordinary end of this process, so that the connections are closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Watch(folder, json.loads((folder / "hosts.plan.json").read_text())).run()


if __name__ == "__main__":
    main()

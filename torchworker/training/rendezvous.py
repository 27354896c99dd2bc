"""Rendezvous for one machine whose store listens on 127.0.0.1 only.

torch's own `c10d` backend opens its TCPStore on every interface. This one hands TCPStore a socket that is
already bound to loopback, and registers itself through the extension point torch documents for that
(`torch.distributed.elastic.rendezvous.rendezvous_handler_registry`). With one agent there is nobody to wait
for, so joining takes no time.
"""

from __future__ import annotations

import socket

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "loopback"
LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """One agent, one fresh store, shared with the ranks as MASTER_ADDR and MASTER_PORT."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        # The store owns the descriptor from here on.
        self._store = TCPStore(
            LOOPBACK,
            self._port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=False,
            master_listen_fd=listener.detach(),
        )
        self._closed = False

    @property
    def use_agent_store(self) -> bool:
        """Ranks use the agent's store and open none."""
        return True

    def get_backend(self) -> str:
        """BACKEND."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """This agent is the first of one."""
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def set_closed(self) -> None:
        """Nobody joins any more."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """None ever does."""
        return 0

    def get_run_id(self) -> str:
        """As it was given."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close it; True, as nothing can go wrong."""
        self._closed = True
        return True


def register() -> None:
    """Make BACKEND known to torch's launcher; calling it again changes nothing."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)

"""Ports on which nobody listens."""

from __future__ import annotations

import socket

from train_and_ship.infra.settings import LOOPBACK


def free_ports(count: int) -> list[int]:
    """All are held until all are found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for candidate in sockets:
            candidate.bind((LOOPBACK, 0))
        return [candidate.getsockname()[1] for candidate in sockets]
    finally:
        for candidate in sockets:
            candidate.close()


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]

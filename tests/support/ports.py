"""Ports on which nobody listens."""

from __future__ import annotations

from train_and_ship.infra.ports import free_ports

__all__ = ["free_port", "free_ports"]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
